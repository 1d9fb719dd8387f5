"""Ranks by the gradients' spectra on MLX: the start, experts, folders for mlx-lm and PEFT, and what is refused."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
import torch
from mlx_lm.tuner.utils import load_adapters
from transformers import LlamaForCausalLM

import lora_one
from lora_one.backends.mlx import load_pretrained
from lora_one.errors import ConfigError, ModelError
from tests.backends import adaptive
from tests.backends.mlx.hf import write_llama
from tests.backends.mlx.models import modules_of, tiny_mixtral, token_batches


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, weight in adaptive.weights().items():
            setattr(self, name, nn.Linear(weight.shape[1], weight.shape[0], bias=False))
            self[name].weight = mx.array(weight)

    def __call__(self, x, z):
        return self.out(mx.tanh(self.wide(x) + self.narrow(z)))


def batches():
    return [tuple(map(mx.array, batch)) for batch in adaptive.batches()]


def squared_error(model, batch):
    x, z, target = batch
    return mx.mean((model(x, z) - target) ** 2)


def started(**options):
    config = lora_one.Config(**{**adaptive.CONFIG.to_dict(), **options})
    return lora_one.init(Net(), batches(), squared_error, config)


def outputs(model):
    return np.array(model(*batches()[0][:2]))


def pairs_of(model):
    return {name: tuple(np.array(model[name][f"lora_{side}"], float).T for side in "ab") for name in adaptive.SIZES}


@pytest.mark.feature("Adaptive rank")
@pytest.mark.parametrize("options", [{}, {"gradient": "exact"}, {"passes": 2, "gamma": "auto"}], ids=str)
def test_the_start_has_the_ranks_that_hold_most_energy_for_the_parameters(options):
    model, report = started(**options)
    if "gamma" in options:
        assert report.gamma_trials[-1].loss <= report.base_loss
    else:
        adaptive.assert_started(pairs_of(model))
    assert {layer.name: layer.rank for layer in report.layers} == adaptive.ranks()
    assert [model[name].scale for name in adaptive.SIZES] == pytest.approx([adaptive.CONFIG.scaling] * 3)


def test_load_and_merge_give_the_trained_outputs(tmp_path):
    model, report = started()
    optimizer = lora_one.optimizer(model, 1e-2, precondition=True, reg=1e-2)
    optimizer.update(model, nn.value_and_grad(model, squared_error)(model, batches()[0])[1])
    lora_one.save(model, tmp_path, report)
    expected = outputs(model)
    # mlx-lm's folder has one rank: the factors are filled up by zeros, which add nothing.
    np.testing.assert_allclose(outputs(lora_one.load(Net(), tmp_path)), expected, atol=1e-6)
    np.testing.assert_allclose(outputs(lora_one.merge(model)), expected, atol=1e-5)


def test_mlx_lm_and_peft_open_the_folder(tmp_path):
    write_llama(tmp_path / "base")
    model, _ = load_pretrained(tmp_path / "base")
    tokens = token_batches()[0][0]
    model, report = lora_one.init(model, token_batches(), config=lora_one.Config(rank=4, rank_max=16, gamma=2.0))
    assert len({layer.rank for layer in report.layers}) > 1
    lora_one.save(model, tmp_path / "ours")
    expected = np.array(model(tokens))
    in_mlx_lm = load_adapters(load_pretrained(tmp_path / "base")[0], str(tmp_path / "ours"))
    np.testing.assert_allclose(np.array(in_mlx_lm(tokens)), expected, atol=2e-5)
    in_peft = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours")
    with torch.no_grad():
        np.testing.assert_allclose(in_peft(torch.tensor(np.array(tokens))).logits.numpy(), expected, atol=2e-5)


def test_the_experts_of_a_layer_have_one_rank():
    config = lora_one.Config(rank=4, rank_max=16)
    model, report = lora_one.init(tiny_mixtral(), token_batches(), config=config)
    ranks: dict[str, set[int]] = {}
    for layer in report.layers:
        ranks.setdefault(layer.name.partition("[")[0], set()).add(layer.rank)
    modules = modules_of(model)
    assert all(len(of_module) == 1 for of_module in ranks.values())
    assert len(set.union(*ranks.values())) > 1
    for path, (rank,) in ranks.items():
        a = modules[path].lora_a
        assert (a.shape[1] if a.ndim == 3 else a.shape[-1]) == rank
    price = sum(layer.rank * (layer.out_features + layer.in_features) for layer in report.layers)
    assert price <= sum(config.rank * (layer.out_features + layer.in_features) for layer in report.layers)


def test_a_model_with_lora_keeps_its_ranks_and_without_batches_there_is_nothing_to_go_by():
    model, _ = started()
    with pytest.raises(ModelError, match="rank_max 6: leave them out"):
        lora_one.init(model, batches(), squared_error, lora_one.Config(rank_max=6, rank=3))
    with pytest.raises(ConfigError, match="no gradient at hand for rank_max=6"):
        lora_one.init(Net(), config=adaptive.CONFIG)
