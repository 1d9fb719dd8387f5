"""The same tiny Llama in transformers and in mlx-lm, through a folder that transformers 5 wrote."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.backends.mlx.models import VOCABULARY


def write_llama(path: Path, seed: int = 0, rope_theta: float = 10000.0, **rope: object) -> LlamaForCausalLM:
    """Save a random Llama. Its rotary base is in rope_parameters, as transformers 5 writes it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta, **rope},
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    return model
