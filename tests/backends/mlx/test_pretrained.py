"""Checkpoints of transformers 5 in mlx-lm: the same logits, the same start as in PyTorch, or an error."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models import gemma3_text, llama
from mlx_lm.utils import load_model

import lora_one
from lora_one.backends.mlx import load_pretrained
from lora_one.backends.mlx.pretrained import check_rope, rope_settings
from tests.backends.mlx.hf import write_llama
from tests.backends.mlx.models import VOCABULARY, modules_of, product

IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))
ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("theta", [500.0, 10000.0])
@pytest.mark.parametrize("kind", ROPES)
def test_logits_are_those_of_transformers(kind, theta, tmp_path):
    reference = write_llama(tmp_path, rope_theta=theta, **ROPES[kind])
    with torch.no_grad():
        expected = reference(torch.tensor(IDS)).logits.numpy()
    model, tokenizer = load_pretrained(tmp_path)
    assert tokenizer is None
    np.testing.assert_allclose(np.array(model(mx.array(IDS))), expected, atol=2e-5)


def test_what_mlx_lm_itself_loads_is_told_from_what_the_checkpoint_means(tmp_path):
    write_llama(tmp_path, rope_theta=500.0)
    model, config = load_model(tmp_path)
    with pytest.raises(lora_one.errors.ModelError, match=r"rope: the rotary base must be 500.0, got 10000"):
        check_rope(model, config)


def test_rotary_parameters_that_cannot_be_passed_on_are_an_error(tmp_path):
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(lora_one.errors.ModelError, match="differ between kinds of layers"):
        rope_settings({"model_type": "gemma3_text", "rope_parameters": nested}, gemma3_text.ModelArgs)
    assert rope_settings({"rope_theta": 1e6}, llama.ModelArgs) == {}
    with pytest.raises(lora_one.errors.ModelError, match="must be a model folder"):
        load_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("gradient", ["sketch", "exact"])
def test_the_start_is_the_one_of_the_torch_backend(gradient, tmp_path):
    """The same weights, batches and seed give the same sketch, though no step of it runs in the same library."""
    reference = write_llama(tmp_path, rope_theta=500.0)
    model, _ = load_pretrained(tmp_path)
    labels = np.where(np.random.default_rng(1).random(IDS.shape) < 0.3, -100, IDS)
    config = lora_one.Config(rank=4, oversample=4, passes=3, gradient=gradient)
    batches = [{"input_ids": IDS, "labels": labels}]
    model, ours = lora_one.init(model, batches, config=config)
    tensors = [{name: torch.tensor(x) for name, x in batch.items()} for batch in batches]
    reference, theirs = lora_one.init(reference, tensors, config=config)
    assert ours.base_loss == pytest.approx(theirs.base_loss, rel=1e-5)
    modules = modules_of(model)
    by_name = {layer.name: layer for layer in theirs.layers}
    assert {layer.name for layer in ours.layers} == by_name.keys()
    for layer in ours.layers:
        other = by_name[layer.name]
        np.testing.assert_allclose(layer.singular_values, other.singular_values, rtol=1e-4)
        peft = reference.get_submodule(f"base_model.model.{layer.name}")
        expected = peft.get_delta_weight("default").detach().double().numpy()
        error = np.linalg.norm(product(modules[layer.name]) - expected) / np.linalg.norm(expected)
        assert error < 1e-4, layer.name
