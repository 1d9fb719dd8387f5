"""Modules that are trained whole beside the LoRA layers: `Config(modules_to_save=...)` on MLX."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import load_adapters

import lora_one
from lora_one.backends.mlx import attach_plain
from lora_one.backends.mlx.whole import whole_modules
from lora_one.checkpoint.tensors import read_tensors
from lora_one.errors import CheckpointError, ModelError
from tests.backends.heads_recipe import run_recipe
from tests.backends.mlx.hf import write_llama
from tests.backends.mlx.models import contents, modules_of, quantize, tiny_llama, tiny_mixtral, token_batches
from tests.frameworks import logits, mlx_model, opened_by_peft, torch_model

CONFIG = lora_one.Config(rank=4, modules_to_save=["lm_head", "model.norm"])
TOKENS = np.random.default_rng(0).integers(1, 90, (2, 12))


def trained(model, config: lora_one.Config = CONFIG, steps: int = 3):
    model, report = lora_one.init(model, token_batches(), config=config)
    optimizer = lora_one.optimizer(model, learning_rate=1e-2, precondition=True)
    gradient = nn.value_and_grad(model, lambda model, batch: default_loss(model, *batch)[0])
    for batch in token_batches() * steps:
        optimizer.update(model, gradient(model, batch)[1])
    mx.eval(model.parameters())
    return model, report


@pytest.mark.feature("New heads (modules_to_save)")
def test_a_trained_head_opens_in_peft_and_here_and_is_merged(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    write_llama(base)
    model, report = trained(mlx_model(base))
    before = {path: np.array(modules_of(mlx_model(base))[path].weight) for path in ("lm_head", "model.norm")}
    for path, weight in before.items():
        assert np.abs(np.array(modules_of(model)[path].weight) - weight).max() > 1e-3
    expected = logits(model, TOKENS)
    lora_one.save(model, folder, report)
    for opened in (
        lora_one.load(mlx_model(base), folder),
        lora_one.load(attach_plain(mlx_model(base), CONFIG), folder),
    ):
        np.testing.assert_array_equal(logits(opened, TOKENS), expected)
    np.testing.assert_allclose(logits(opened_by_peft(base, folder), TOKENS), expected, rtol=0, atol=1e-4)
    again = lora_one.load(mlx_model(base), folder)  # frozen, and still a part of the adapter
    lora_one.save(again, tmp_path / "again")
    np.testing.assert_array_equal(logits(lora_one.load(mlx_model(base), tmp_path / "again"), TOKENS), expected)
    head = np.array(model.lm_head.weight)
    merged = lora_one.merge(model)
    np.testing.assert_array_equal(np.array(merged.lm_head.weight), head)
    np.testing.assert_allclose(logits(merged, TOKENS), expected, rtol=0, atol=1e-4)
    assert not whole_modules(merged)


def test_a_folder_of_peft_opens(tmp_path):
    """Also one whose names are ends of paths, and whose modules hold others: every norm, and the whole attention."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    write_llama(base)
    config = peft.LoraConfig(r=3, target_modules=["up_proj"], modules_to_save=["norm", "1.self_attn"])
    model = peft.get_peft_model(torch_model(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    opened = lora_one.load(mlx_model(base), folder, trainable=True)
    np.testing.assert_allclose(logits(opened, TOKENS), logits(model, TOKENS), rtol=0, atol=1e-4)
    assert set(whole_modules(opened)) == {
        "model.norm", "model.layers.1.self_attn",
        *(f"model.layers.{i}.{kind}_layernorm" for i in (0, 1) for kind in ("input", "post_attention")),
    }  # fmt: skip


def test_what_trains_and_that_the_layers_start_as_without_it():
    """The gradient of a layer does not depend on what else is trained."""
    model, report = lora_one.init(tiny_llama(), token_batches(), config=CONFIG)
    alone, _ = lora_one.init(tiny_llama(), token_batches(), config=lora_one.Config(rank=4))
    assert not any(layer.name in ("lm_head", "model.norm") for layer in report.layers)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert {name for name in names if "lora_" not in name} == {"lm_head.weight", "model.norm.weight"}
    with_head, without = contents(model), contents(alone)
    assert with_head.keys() == without.keys()
    for name, array in without.items():
        np.testing.assert_array_equal(with_head[name], array, err_msg=name)


def test_the_head_follows_adamw_and_is_not_preconditioned():
    model, _ = lora_one.init(tiny_llama(), token_batches(), config=CONFIG)
    optimizer = lora_one.optimizer(model, learning_rate=1e-2, precondition=True)
    loss = nn.value_and_grad(model, lambda model, batch: default_loss(model, *batch)[0])
    _, gradients = loss(model, token_batches()[0])
    weight, gradient = (np.array(x).astype(np.float64) for x in (model.lm_head.weight, gradients["lm_head"]["weight"]))
    optimizer.update(model, gradients)
    expected = weight - 1e-2 * gradient / (np.abs(gradient) + 1e-8)  # Adam's first step
    np.testing.assert_allclose(np.array(model.lm_head.weight), expected, rtol=0, atol=1e-6)


class Reader(nn.Module):
    """A convolution as the new head."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.head = nn.Conv1d(8, 5, 3)

    def __call__(self, x):
        return self.head(mx.tanh(self.up(x)))


def test_a_convolution_has_pytorchs_order_of_axes_in_pefts_file(tmp_path):
    mx.random.seed(0)
    batch = mx.random.normal((2, 7, 6))
    config = lora_one.Config(rank=2, modules_to_save=["head"])
    model, _ = lora_one.init(Reader(), [batch], lambda model, x: mx.mean(model(x) ** 2), config)
    lora_one.save(model, tmp_path)
    kernel = read_tensors(tmp_path / "adapter_model.safetensors")["base_model.model.head.weight"].array
    np.testing.assert_array_equal(kernel, np.moveaxis(np.array(model.head.weight), -1, 1))
    fresh = Reader()
    fresh.up = model.up.linear
    np.testing.assert_array_equal(np.array(lora_one.load(fresh, tmp_path)(batch)), np.array(model(batch)))


def test_an_adapter_of_experts_keeps_its_head_in_mlx_lms_layout(tmp_path):
    """PEFT's has no names for experts. mlx-lm itself opens factors alone, and says so."""
    model = attach_plain(tiny_mixtral(), lora_one.Config(rank=2, modules_to_save=["lm_head"]))
    model.lm_head.weight = model.lm_head.weight + 1.0
    lora_one.save(model, tmp_path)
    np.testing.assert_array_equal(logits(lora_one.load(tiny_mixtral(), tmp_path), TOKENS), logits(model, TOKENS))
    with pytest.raises(ValueError, match=r"lm_head\.weight: not an adapter parameter"):
        load_adapters(tiny_mixtral(), str(tmp_path))


ERRORS = {
    "unknown": ({"modules_to_save": ["lm_haed"]}, r"got \['lm_haed'\]; at its top are: .*; near names: lm_head"),
    "also a target": (
        {"modules_to_save": ["1.self_attn"], "targets": ["q_proj"]},
        r"must name different modules, got both for model\.layers\.1\.self_attn\.q_proj",
    ),
    "quantised": ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight is uint32: a quantised module cannot be trained"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_leave_the_model_as_it_was(name):
    settings, message = ERRORS[name]
    model = quantize(tiny_llama(), "affine", 32, 4) if name == "quantised" else tiny_llama()
    before = contents(model)
    with pytest.raises(ModelError, match=message):
        lora_one.init(model, token_batches(), config=lora_one.Config(rank=4, **settings))
    assert contents(model).keys() == before.keys() and not whole_modules(model)


def test_a_head_that_only_one_side_has_is_an_error(tmp_path):
    plain = attach_plain(tiny_llama(), lora_one.Config(rank=4))
    with_head = attach_plain(tiny_llama(), CONFIG)
    lora_one.save(plain, tmp_path / "without")
    lora_one.save(with_head, tmp_path / "with")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: .* the model has no such module to save"):
        lora_one.load(plain, tmp_path / "with")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: the model keeps it whole, the file has none"):
        lora_one.load(with_head, tmp_path / "without")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: its module is quantised in the model"):
        lora_one.load(quantize(tiny_llama(), "affine", 32, 4), tmp_path / "with")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: must be \(80, 64\), got \(96, 64\)"):
        lora_one.load(tiny_llama(vocab_size=80), tmp_path / "with")
    with pytest.raises(ModelError, match=r"modules_to_save \('lm_head', 'model.norm'\) \(the adapter's: \(\)\)"):
        lora_one.init(plain, token_batches(), config=CONFIG)


@pytest.mark.feature("New heads (modules_to_save)")
def test_the_documented_recipe(tmp_path, monkeypatch):
    """docs/guide/new-heads.md, word for word: the fit lowers the loss, and the adapter carries the head."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "model")
    rng = np.random.default_rng(0)
    batches = [(mx.array(rng.integers(1, 90, (4, 6))), mx.array(rng.integers(0, 16, 4))) for _ in range(2)]

    def forget_head(model):
        model.head.weight = mx.zeros((16, 64))

    run_recipe("MLX", r"^model\.freeze|^config = ", batches, forget_head)
