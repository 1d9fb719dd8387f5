"""LoRA on embeddings, by mlx-lm's LoRAEmbedding: the gradient of the table by MLX itself, mlx-lm and PEFT."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding
from mlx_lm.tuner.trainer import default_loss

import lora_one
from lora_one.backends.mlx.attach import find_sites
from lora_one.backends.mlx.layout import read_pairs
from lora_one.errors import CheckpointError, ModelError
from tests.arrays import best_rank
from tests.backends.mlx.hf import write_llama
from tests.backends.mlx.models import VOCABULARY, dequantized, quantize, tiny_llama, token_batches
from tests.frameworks import logits, mlx_model, opened_by_lora_one, opened_by_mlx_lm, opened_by_peft

RANK = 4
TARGETS = ["embed_tokens", "q_proj"]
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 9))


def gradient(model: nn.Module) -> np.ndarray:
    """The mean gradient of a float table, (dim, tokens), through all its uses."""
    model.unfreeze()
    total = 0.0
    for batch in token_batches():
        gradients = nn.value_and_grad(model, lambda model, batch: default_loss(model, *batch)[0])(model, batch)[1]
        total += np.array(dict(tree_flatten(gradients))["model.embed_tokens.weight"], np.float64) / 2
    return np.asarray(total).T


def product(model: nn.Module) -> np.ndarray:
    [pair] = next(read_pairs(site.module) for site in find_sites(model) if site.path == "model.embed_tokens")
    return np.array(pair.lora_B, np.float64) @ np.array(pair.lora_A, np.float64)


@pytest.mark.feature("Embeddings")
@pytest.mark.parametrize("settings", [{"gradient": "exact"}, {}], ids=["exact", "sketch"])
@pytest.mark.parametrize("kind", ["untied", "tied", "4 bits"])
def test_a_start_is_the_truncated_svd_of_the_tables_gradient(kind, settings):
    """Of a tied table both uses count, as mlx-lm's LoRA is in both."""
    model = tiny_llama(tie_word_embeddings=kind == "tied")
    if kind == "4 bits":
        quantize(model, "affine", 32, 4)
    g = gradient(dequantized(model) if kind == "4 bits" else tiny_llama(tie_word_embeddings=kind == "tied"))
    config = lora_one.Config(rank=RANK, targets=TARGETS, oversample=60, **settings)
    _, report = lora_one.init(model, token_batches(), config=config)
    layer = next(layer for layer in report.layers if layer.name == "model.embed_tokens")
    assert isinstance(model.model.embed_tokens, LoRAEmbedding) and g.shape == (layer.out_features, layer.in_features)
    step = -best_rank(g, RANK) / np.linalg.norm(g, 2) / 128.0
    assert np.linalg.norm(product(model) - step) <= 2e-3 * np.linalg.norm(step)
    assert layer.gradient_norm == pytest.approx(np.linalg.norm(g), rel=1e-3)


def test_a_folder_opens_in_mlx_lm_in_peft_and_here_and_merging_changes_nothing(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "folder"
    write_llama(base)
    model, report = lora_one.init(
        mlx_model(base), token_batches(), config=lora_one.Config(rank=RANK, targets=TARGETS, gamma=2.0)
    )
    expected = logits(model, TOKENS)
    assert np.abs(expected - logits(mlx_model(base), TOKENS)).max() > 0.01
    lora_one.save(model, folder, report)
    for opened in (
        opened_by_mlx_lm(base, folder),
        opened_by_peft(base, folder),
        opened_by_lora_one("mlx", base, folder),
    ):
        np.testing.assert_allclose(logits(opened, TOKENS), expected, atol=2e-5)
    (folder / "adapters.safetensors").unlink()  # PEFT's layout is left
    np.testing.assert_allclose(logits(opened_by_lora_one("mlx", base, folder), TOKENS), expected, atol=2e-5)
    merged = lora_one.merge(model)
    assert type(merged.model.embed_tokens) is nn.Embedding
    np.testing.assert_allclose(logits(merged, TOKENS), expected, atol=2e-5)


def test_a_tied_table_has_no_place_in_peft(tmp_path):
    """mlx-lm adds its LoRA to the output layer too, and PEFT does not."""
    model, report = lora_one.init(
        tiny_llama(tie_word_embeddings=True), token_batches(), config=lora_one.Config(rank=RANK, targets=TARGETS)
    )
    lora_one.save(model, tmp_path / "tied", report)
    assert not (tmp_path / "tied" / "adapter_model.safetensors").exists()
    again = lora_one.load(tiny_llama(tie_word_embeddings=True), tmp_path / "tied")
    tokens = mx.array(TOKENS)
    expected = np.array(model(tokens))
    np.testing.assert_array_equal(np.array(again(tokens)), expected)
    np.testing.assert_allclose(np.array(lora_one.merge(again)(tokens)), expected, atol=1e-5)
    untied, report = lora_one.init(tiny_llama(), token_batches(), config=lora_one.Config(rank=RANK, targets=TARGETS))
    lora_one.save(untied, tmp_path / "untied", report)
    (tmp_path / "untied" / "adapters.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.embed_tokens: PEFT adds LoRA on an embedding to no tied output"):
        lora_one.load(tiny_llama(tie_word_embeddings=True), tmp_path / "untied")


@pytest.mark.feature("Convolutions", refused=True)
def test_a_convolution_is_an_error():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(4, 4))
    config = lora_one.Config(rank=2, targets=["layers.0"])
    with pytest.raises(
        ModelError, match=r"linear layers and embeddings only, got .*, which matches layers.0 \(Conv1d\)"
    ):
        lora_one.init(model, [mx.ones((1, 5, 3))], lambda model, x: mx.mean(model(x) ** 2), config)
    assert type(model.layers[0]) is nn.Conv1d
