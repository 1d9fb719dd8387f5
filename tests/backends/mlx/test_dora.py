"""DoRA on MLX: mlx-lm's layers, whose magnitudes start at the norms of W + s B0 A0."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

import lora_one
from lora_one.backends.mlx import attach_plain
from lora_one.backends.mlx.attach import find_sites
from lora_one.backends.mlx.layout import read_pairs
from lora_one.backends.mlx.merge import float_weight
from tests.backends.mlx.models import VOCABULARY, contents, quantize, tiny_llama, tiny_mixtral, token_batches

LORA = lora_one.Config(rank=4)
DORA = dataclasses.replace(LORA, dora=True)
TOKENS = mx.array(np.random.default_rng(0).integers(0, VOCABULARY, (2, 12)))
# Six bits too: mlx-lm's own DoRALinear.from_base takes such weights for narrower than they are.
WEIGHTS = [None, ("affine", 32, 4), ("affine", 32, 6), ("mxfp4", 32, 4)]


def model_of(weights) -> nn.Module:
    return tiny_llama() if weights is None else quantize(tiny_llama(), *weights)


def output(model) -> np.ndarray:
    return np.array(model(TOKENS))


def loss(model, batch):
    return default_loss(model, *batch)[0]


def train(model, optimizer, steps: int, compiled: bool = False) -> list[np.ndarray]:
    """The outputs after each step."""

    def step(batch):
        _, gradients = nn.value_and_grad(model, loss)(model, batch)
        optimizer.update(model, gradients)

    state = [model.state, optimizer.state]
    step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    outputs, batches = [], token_batches()
    for i in range(steps):
        step(tuple(map(mx.array, batches[i % len(batches)])))
        mx.eval(state)
        outputs.append(output(model))
    return outputs


def assert_computes_the_sum(model) -> None:
    for site in find_sites(model):
        a, b = (np.array(factor, np.float64) for factor in read_pairs(site.module)[0])
        adapted = np.array(float_weight(site.module.linear), np.float64) + site.module.scale * b @ a
        np.testing.assert_allclose(np.array(site.module.m), np.linalg.norm(adapted, axis=1), rtol=1e-6)


@pytest.mark.feature("DoRA")
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_start_is_that_of_lora_and_the_model_computes_w_plus_s_b_a(weights):
    lora, _ = lora_one.init(model_of(weights), token_batches(), config=LORA)
    dora, _ = lora_one.init(model_of(weights), token_batches(), config=DORA)
    for one, two in zip(find_sites(lora), find_sites(dora), strict=True):
        for name in ("lora_a", "lora_b"):
            np.testing.assert_array_equal(np.array(one.module[name]), np.array(two.module[name]))
    assert_computes_the_sum(dora)
    np.testing.assert_allclose(output(dora), output(lora), atol=1e-5)
    names = {name.rpartition(".")[2] for name, _ in tree_flatten(dora.trainable_parameters())}
    assert names == {"lora_a", "lora_b", "m"}


@pytest.mark.feature("DoRA")
def test_saved_it_opens_in_mlx_lm_and_here_and_merged_it_computes_the_same(tmp_path):
    model, report = lora_one.init(tiny_llama(), token_batches(), config=DORA)
    before = [np.array(site.module.m) for site in find_sites(model)]
    train(model, lora_one.optimizer(model, 1e-2, precondition=True), 2)
    for site, m in zip(find_sites(model), before, strict=True):  # two steps of AdamW at its rate, without W's inverse
        assert 1e-3 < np.abs(np.array(site.module.m) - m).max() <= 2e-2 * 1.01
    expected = output(model)
    lora_one.save(model, tmp_path, report)
    np.testing.assert_array_equal(output(load_adapters(tiny_llama(), str(tmp_path))), expected)
    np.testing.assert_array_equal(output(lora_one.load(tiny_llama(), tmp_path)), expected)
    frozen = lora_one.load(tiny_llama(), tmp_path, trainable=False)
    assert not tree_flatten(frozen.trainable_parameters())
    with pytest.raises(lora_one.errors.CheckpointError, match=r"q_proj: only the file has DoRA's magnitudes here"):
        lora_one.load(attach_plain(tiny_llama(), LORA), tmp_path)
    np.testing.assert_allclose(output(lora_one.merge(model)), expected, atol=1e-5)


@pytest.mark.parametrize(("compiled", "steps"), [(False, 3), (True, 3), (True, "auto")])
def test_a_start_without_data_renews_the_magnitudes_and_then_trains_them(compiled, steps):
    outputs = []
    for config in (LORA, DORA):
        model, report = lora_one.init(tiny_llama(), config=config)
        count = 3 if steps == 3 else 6
        outputs.append(train(model, lora_one.optimizer(model, 1e-2, start_steps=steps), count, compiled))
        report.summary()  # fills it in
        assert report.done and report.steps == count
    assert_computes_the_sum(model)
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)
    optimizer = lora_one.optimizer(model, 1e-2, start_steps=0)
    m = [np.array(site.module.m) for site in find_sites(model)]
    train(model, optimizer, 1, compiled)
    for site, before in zip(find_sites(model), m, strict=True):
        assert np.abs(np.array(site.module.m) - before).max() == pytest.approx(1e-2, rel=1e-2)


def test_mlx_lms_own_adapter_is_started_and_a_failure_restores_it():
    model = tiny_llama()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    linear_to_lora_layers(model, 2, parameters, use_dora=True)
    for site in find_sites(model):
        site.module.m = site.module.m * 1.5
    before = contents(model)

    def failing(model, batch):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        lora_one.init(model, token_batches(), failing)
    for name, value in contents(model).items():
        np.testing.assert_array_equal(value, before[name])
    lora_one.init(model, token_batches())
    assert_computes_the_sum(model)


def test_what_cannot_have_dora_is_refused():
    before = contents(model := tiny_mixtral())
    with pytest.raises(lora_one.errors.ModelError, match=r"dora=True is for linear layers, got .*switch_mlp"):
        lora_one.init(model, token_batches(), config=DORA)
    assert contents(model).keys() == before.keys()
    with pytest.raises(lora_one.errors.ModelError, match=r"dora True \(the adapter's: False\)"):
        lora_one.init(attach_plain(tiny_llama(), LORA), token_batches(), config=DORA)
    model, _ = lora_one.init(tiny_llama(), config=DORA)
    optimizer = lora_one.optimizer(model, 1e-2, start_steps=2)
    _, gradients = nn.value_and_grad(model, loss)(model, tuple(map(mx.array, token_batches()[0])))
    with pytest.raises(lora_one.errors.ModelError, match="the start of DoRA needs the base weights too"):
        optimizer.apply_gradients(gradients, model.trainable_parameters())
