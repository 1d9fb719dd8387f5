"""LoRA inside nnx.Embed and nnx.Conv. Their weight is no matrix that multiplies the input as it is.

The gradient of a table comes from lookups, that of a kernel from patches. In a fold pass a tap reads it as JAX makes
it, at the weight. In training lora_a is itself a table, or a kernel of r outputs.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lora_one.backends.jax.layout import Layout, plain_layout, possible_layouts
from lora_one.backends.jax.placement import explicit_sharding
from lora_one.backends.jax.tap import Tap

_HIGHEST = lax.Precision.HIGHEST
TABLE, KERNEL = "embedding", "kernel"


class LoraEmbed(nnx.Embed):
    """`nnx.Embed` with LoRA: the table is W + scale * a b, for lookups and for `attend` alike, without dropout."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        a, b, scale = _factors(self, TABLE)
        if isinstance(a, Tap):
            return nnx.Embed.__call__(self._watched(a), inputs, out_sharding)
        y = super().__call__(inputs, out_sharding)
        return _added(y, jnp.take(a, inputs, axis=0), b, scale)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        a, b, scale = _factors(self, TABLE)
        if isinstance(a, Tap):
            return nnx.Embed.attend(self._watched(a), query, out_sharding)
        y = super().attend(query, out_sharding)
        dtype = jnp.promote_types(query.dtype, b.dtype)
        narrow = jnp.matmul(query.astype(dtype), b.T.astype(dtype), precision=_HIGHEST)  # (..., r)
        return _added(y, narrow, a.T, scale)

    def _watched(self, tap: Tap) -> Any:
        """Return the layer with a table whose gradient the tap reads."""
        return _with(self, embedding=plain_layout(self.embedding.shape, 1, 1).watched(self.embedding[...], tap))


class LoraConv(nnx.Conv):
    """`nnx.Conv` with LoRA: a convolution with the kernel a (size..., in, r), and b at each position."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        a, b, scale = _factors(self, KERNEL)
        if isinstance(a, Tap):
            kernel = plain_layout(self.kernel.shape, len(self.kernel_size) + 1, 1).watched(self.kernel[...], a)
            return nnx.Conv.__call__(_with(self, kernel=kernel), inputs, out_sharding)
        y = super().__call__(inputs, out_sharding)
        dropout = getattr(self, f"{KERNEL}_lora_dropout", None)
        if dropout is not None and not dropout.deterministic:
            inputs = dropout(inputs)
        dtype = jnp.promote_types(inputs.dtype, a.dtype)
        thin = _with(self, kernel=a, bias=None, use_bias=False, dtype=dtype, precision=_HIGHEST)
        narrow = nnx.Conv.__call__(thin, inputs)  # (..., r)
        return _added(y, narrow, b, scale)


def table_layouts(layer: nnx.Embed) -> list[Layout]:
    """Return the layouts that a table, (tokens, features), may have: the tokens are the input."""
    return possible_layouts(layer.embedding.shape, plain_layout((layer.num_embeddings, layer.features), 1, 1))


def kernel_layouts(layer: nnx.Conv) -> list[Layout]:
    """Return the layouts that a kernel, (size..., in, out), may have.

    Raises:
        ValueError: a convolution in groups, or with a mask, whose weights are not one matrix.
    """
    if layer.feature_group_count > 1 or layer.mask is not None:
        what = "a mask" if layer.mask is not None else f"feature_group_count={layer.feature_group_count}"
        raise ValueError(f"it is a convolution with {what}, which is no single matrix: leave it out of the targets")
    inner = plain_layout(tuple(layer.kernel_shape), len(layer.kernel_size) + 1, 1)
    return possible_layouts(layer.kernel.shape, inner)


def _factors(layer: Any, param: str) -> tuple[Any, Any, float]:
    a, b = getattr(layer, f"{param}_lora_a"), getattr(layer, f"{param}_lora_b")
    return a[...], b[...], getattr(layer, f"{param}_lora_scale")


def _with(layer: Any, **changes: Any) -> Any:
    """Return what a layer's own `__call__` reads, with some of it exchanged."""
    return SimpleNamespace(**{**vars(layer), **changes})


def _added(y: jax.Array, narrow: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Return y + scale * narrow b, in the dtype of y; narrow is (..., r), b (r, out)."""
    dtype = jnp.promote_types(narrow.dtype, b.dtype)
    axes = (((narrow.ndim - 1,), (0,)), ((), ()))
    wide = lax.dot_general(
        narrow.astype(dtype), b.astype(dtype), axes, precision=_HIGHEST, out_sharding=explicit_sharding(y)
    )
    return y + (scale * wide).astype(y.dtype)
