import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lora_one.backends.jax import load_llama
from lora_one.backends.jax.llama.model import causal_lm_loss
from lora_one.errors import CheckpointError, ConfigError, ModelError

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e3,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-tied-biased-mha": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "llama3-rope": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "linear-rope": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 5, "head_dim": 16}),
    "qwen2-tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (
        transformers.Qwen3Config,
        {"head_dim": 16, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ),
}


def make(name: str, folder, dtype=torch.float32):
    """A tiny random model of a family in transformers, saved to a folder."""
    config_class, options = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **options}))
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide what is done with them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_loss_are_transformers(name, tmp_path):
    reference = make(name, tmp_path)
    model = load_llama(tmp_path)
    tokens = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        expected = reference(tokens, labels=labels)
    got = jax.jit(lambda t: model(t))(tokens.numpy())
    np.testing.assert_allclose(got, expected.logits.numpy(), atol=1e-4)
    batch = {"input_ids": jnp.asarray(tokens.numpy()), "labels": jnp.asarray(labels.numpy())}
    assert float(causal_lm_loss(model, batch)) == pytest.approx(float(expected.loss), abs=1e-5)


def test_left_padding_is_not_seen(tmp_path):
    make("llama", tmp_path)
    model = load_llama(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 60, (1, 9))
    padded = np.concatenate([np.full((1, 3), 7), tokens], axis=1)
    mask = np.concatenate([np.zeros((1, 3), int), np.ones((1, 9), int)], axis=1)
    np.testing.assert_allclose(model(padded, mask)[:, 3:], model(tokens), atol=1e-5)


def test_bfloat16_and_shards(tmp_path):
    reference = make("llama", tmp_path / "one", torch.bfloat16)
    reference.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert not (tmp_path / "many" / "model.safetensors").exists()
    one, many = load_llama(tmp_path / "one", jnp.bfloat16), load_llama(tmp_path / "many", jnp.bfloat16)
    assert one.lm_head.kernel.dtype == jnp.bfloat16
    tokens = np.arange(12)[None]
    np.testing.assert_array_equal(one(tokens), many(tokens))
    wide = load_llama(tmp_path / "one")
    np.testing.assert_array_equal(wide.lm_head.kernel[...], reference.lm_head.weight.detach().float().numpy().T)


def test_what_cannot_be_loaded_says_all_that_is_wrong(tmp_path):
    with pytest.raises(ModelError, match=r"must hold a model's config\.json"):
        load_llama(tmp_path)
    make("llama", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "intermediate_size": 40, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError) as caught:
        load_llama(tmp_path)
    assert "model.layers.0.mlp.up_proj.weight: must be (32, 40) as kernel, got (32, 48)" in caught.value.problems
    assert "model.layers.2.self_attn.q_proj.weight: missing" in caught.value.problems
    file.write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ModelError, match="must be one of llama, mistral, qwen2, qwen3, got 'gpt2'"):
        load_llama(tmp_path)
    file.write_text(json.dumps({**config, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}))
    with pytest.raises(ModelError, match="rope_type must be default, linear or llama3, got 'yarn'"):
        load_llama(tmp_path)
    with pytest.raises(ConfigError, match="float64 needs JAX's x64"):
        load_llama(tmp_path, jnp.float64)
