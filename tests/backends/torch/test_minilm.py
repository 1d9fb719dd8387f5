"""A real spectrum: the pretrained MiniLM encoder on real text."""

import copy
import warnings

import numpy as np
import pytest

import lora_one
from benchmarks.energy import exact_gradients, factors_of
from benchmarks.minilm import contrastive_loss, docstring_pairs, load_minilm, pair_batches
from lora_one.core.alignment import captured_energy

NUMPY = lora_one.backends.load_backend("numpy").ops
RANK = 8


@pytest.fixture(scope="module")
def encoder():
    model, tokenizer = load_minilm()
    batches = pair_batches(tokenizer, docstring_pairs(24), 12)
    return model, batches, exact_gradients(model, batches)


def start(encoder, config):
    model, batches, _ = encoder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pooler is no part of the loss
        return lora_one.init(copy.deepcopy(model), batches, contrastive_loss, config)


@pytest.mark.parametrize(("passes", "least"), [(1, 0.975), (2, 0.997)])
def test_one_pass_holds_98_percent_of_the_best_energy_in_every_layer_and_two_nearly_all(encoder, passes, least):
    model, report = start(encoder, lora_one.Config(passes=passes))
    told = {layer.name: layer.share_of_best for layer in report.layers}
    assert len(encoder[2]) == 36 and report.passes == passes
    for name, g in encoder[2].items():
        best = np.sum(np.linalg.svd(g, compute_uv=False)[:RANK] ** 2)
        share = captured_energy(NUMPY, g, factors_of(model, name)) * np.sum(g**2) / best
        assert share >= least, name
        assert share - 0.02 <= told[name] <= share + 0.005, name
    assert report.plain_layers == ["pooler.dense"]


def test_an_exact_start_holds_what_the_best_of_its_rank_does(encoder):
    model, report = start(encoder, lora_one.Config(gradient="exact"))
    told = {layer.name: layer.share_of_best for layer in report.layers}
    for name, g in encoder[2].items():
        best = np.sum(np.linalg.svd(g, compute_uv=False)[:RANK] ** 2)
        share = captured_energy(NUMPY, g, factors_of(model, name)) * np.sum(g**2) / best
        assert share >= 0.9999 and told[name] <= share + 1e-5, name
