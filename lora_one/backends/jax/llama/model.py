"""Decoders of the Llama family in Flax NNX: Llama, Mistral, Qwen2 and Qwen3, with the module paths of transformers.

The decoder is compact on purpose: it computes whole sequences and has no key-value cache. Norms, rotations, softmax
and loss run in float32, as in transformers, or in float64 if the weights are float64.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lora_one.backends.interface import IGNORED

from .config import LlamaConfig


class RMSNorm(nnx.Module):
    """The normalisation x / rms(x) * weight over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, features: int, eps: float, dtype: Any):
        self.weight = nnx.Param(jnp.ones(features, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(_wide(x.dtype))
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * normal.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; Qwen3 normalises queries and keys per head."""

    def __init__(self, config: LlamaConfig, index: int, rngs: nnx.Rngs, dtype: Any):
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        options = {"param_dtype": dtype, "rngs": rngs}
        self.q_proj = nnx.Linear(config.hidden_size, heads * size, use_bias=config.qkv_bias, **options)
        self.k_proj = nnx.Linear(config.hidden_size, groups * size, use_bias=config.qkv_bias, **options)
        self.v_proj = nnx.Linear(config.hidden_size, groups * size, use_bias=config.qkv_bias, **options)
        self.o_proj = nnx.Linear(heads * size, config.hidden_size, use_bias=config.output_bias, **options)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(size, config.rms_norm_eps, dtype)
        self.qk_norm = config.qk_norm
        self.shape = heads, groups, size
        self.window = config.windows[index]

    def __call__(self, x: Array, rotation: tuple[Array, Array], mask: Array | None) -> Array:
        """Attend to the earlier tokens that a mask, (rows, 1 or query, key), leaves visible."""
        heads, groups, size = self.shape
        rows, length, _ = x.shape
        q = self.q_proj(x).reshape(rows, length, heads, size)
        k = self.k_proj(x).reshape(rows, length, groups, size)
        v = self.v_proj(x).reshape(rows, length, groups, size)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        q = q.reshape(rows, length, groups, heads // groups, size)
        scores = jnp.einsum("bqghd,bkgd->bghqk", q, k).astype(_wide(x.dtype)) / math.sqrt(size)
        distance = jnp.arange(length)[:, None] - jnp.arange(length)  # (query, key)
        visible = (distance >= 0) if self.window is None else (distance >= 0) & (distance < self.window)
        visible = visible if mask is None else visible & mask[:, None, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(scores.dtype).min), axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bghqk,bkgd->bqghd", weights, v)
        return self.o_proj(mixed.reshape(rows, length, heads * size))


class Mlp(nnx.Module):
    """The gated MLP: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: Any):
        options = {"use_bias": config.mlp_bias, "param_dtype": dtype, "rngs": rngs}
        self.gate_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **options)
        self.up_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **options)
        self.down_proj = nnx.Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One layer of the decoder."""

    def __init__(self, config: LlamaConfig, index: int, rngs: nnx.Rngs, dtype: Any):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, index, rngs, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = Mlp(config, rngs, dtype)

    def __call__(self, x: Array, rotation: tuple[Array, Array], mask: Array | None) -> Array:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """The embedding and the layers: tokens to hidden states."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: Any):
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=dtype, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, i, rngs, dtype) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.config = config
        self.checkpointing = False  # compute the activations of a layer again in the backward pass

    def __call__(self, tokens: Array, mask: Array | None = None, positions: Array | None = None) -> Array:
        x = self.embed_tokens(tokens)
        visible = None if mask is None else mask[:, None].astype(bool)  # (rows, 1, key)
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        else:
            example = jnp.cumsum(positions == 0, axis=1)  # (rows, length)
            same = example[:, :, None] == example[:, None]  # (rows, query, key)
            visible = same if visible is None else same & visible
        rotation = _rotation(self.config, positions, x.dtype)
        for layer in self.layers:
            call = nnx.remat(Block.__call__) if self.checkpointing else Block.__call__
            x = call(layer, x, rotation, visible)
        return self.norm(x)


class LlamaForCausalLM(nnx.Module):
    """A causal language model of the Llama family. See `lora_one.backends.jax.load_llama`."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.model = Decoder(config, rngs, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, param_dtype=dtype, rngs=rngs
            )
        self.config = config

    def __call__(
        self, input_ids: Array, attention_mask: Array | None = None, position_ids: Array | None = None
    ) -> Array:
        """Return the logits, (rows, length, vocabulary), of tokens, (rows, length).

        Args:
            input_ids: the tokens.
            attention_mask: (rows, length), 0 where a token is padding. Padding on the right needs no mask, since a
                token does not look at later ones.
            position_ids: (rows, length), for rows that hold several examples: 0 where one begins, and counted from
                there. Tokens of other examples are not visible.
        """
        x = self.model(input_ids, attention_mask, position_ids)
        return self.model.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)


def causal_lm_loss(model: Any, batch: dict[str, Array]) -> Array:
    """Return the mean cross-entropy of the next token over the labels that are not -100: the loss of transformers.

    Args:
        model: (input_ids, attention_mask) -> logits.
        batch: "input_ids" and "labels", (rows, length), and optionally "attention_mask" and "position_ids".

    Returns:
        A scalar in float32 or wider.
    """
    packed = {name: batch[name] for name in ("position_ids",) if name in batch}
    logits = model(batch["input_ids"], batch.get("attention_mask"), **packed)[:, :-1]
    logits = logits.astype(_wide(logits.dtype))
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(counted, losses, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def _rotation(config: LlamaConfig, positions: Array, dtype: Any) -> tuple[Array, Array]:
    """Return (cos, sin) of each position and frequency, (length, head_dim) or (rows, length, head_dim)."""
    frequencies = jnp.asarray(config.frequencies(), _wide(dtype))  # (head_dim / 2,)
    angles = positions.astype(_wide(dtype))[..., None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    cos, sin = (table[..., None, :] for table in rotation)  # (length, 1, head_dim), perhaps for each row
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
