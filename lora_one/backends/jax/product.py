"""The LoRA product x a b, added to the output of a base layer, in the shapes that Flax's layers have.

Factors are lora_a (stack..., in..., r) and lora_b (stack..., r, out...). Products run in the wider of the input's and
the factors' dtype and at the highest precision: rank r is small beside the base product, and a sketch reads these
products as numbers. On a mesh with Explicit axes, a product over a sharded axis must say where its result goes. The
narrow product gets the sharding of x, whole along r, and the result gets that of the base layer's output.

In a fold pass a tap stands where lora_a stands: nothing is added then, and the backward pass reads x and dy.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from .layout import einsum_axes
from .placement import explicit_sharding, full_spec
from .tap import Tap

_PRECISION = lax.Precision.HIGHEST


class Dropping(NamedTuple):
    """A layer's lora_a while dropout is on. As in PEFT, the base layer sees the whole x, and lora_a what is left."""

    a: Array  # (stack..., in..., r)
    drop: Callable[[Array], Array]  # x -> x with zeros, divided by the share that is kept


Narrow = Array | Tap | Dropping  # what a layer has as its lora_a


def add_general(
    y: Array,
    x: Array,
    a: Narrow,
    b: Array,
    scale: float,
    axis: tuple[int, ...],
    batch_axis: tuple[int, ...] = (),
) -> Array:
    """Return y + scale * x a b for a layer that contracts `axis` of x and shares `batch_axis` with its kernel.

    Args:
        y: the base layer's output, (batch..., rest..., out...); the result has its dtype.
        x: the layer's input.
        a: lora_a, (stack..., in..., r), or what stands there.
        b: lora_b, (stack..., r, out...).
        scale: the factor s of the product.
        axis: contracted axes of x, not negative.
        batch_axis: axes of x that the kernel has too, not negative.
    """
    kept = [i for i in range(x.ndim) if i not in axis and i not in batch_axis]
    if isinstance(a, Tap):
        return a.watch(y, jnp.transpose(x, (*kept, *axis)))
    if isinstance(a, Dropping):
        x, a = a.drop(x), a.a
    x, a, b = _widened(x, a, b)
    n = len(batch_axis)
    lead = tuple(range(n))
    narrow = lax.dot_general(
        x,
        a,
        ((axis, tuple(range(n, n + len(axis)))), (batch_axis, lead)),
        precision=_PRECISION,
        out_sharding=_narrow_sharding(x, [*batch_axis, *kept]),
    )  # (batch..., rest..., r)
    wide = lax.dot_general(
        narrow, b, (((narrow.ndim - 1,), (n,)), (lead, lead)), precision=_PRECISION, out_sharding=explicit_sharding(y)
    )
    return y + (scale * wide).astype(y.dtype)


def add_einsum(y: Array, x: Array, a: Narrow, b: Array, scale: float, equation: str) -> Array:
    """Return y + scale * (the layer's own einsum of x with a b instead of the kernel), in the dtype of y."""
    inputs, result = equation.replace(" ", "").split("->")
    left = inputs.split(",")[0]
    shared, contracted, new = einsum_axes(equation)
    if isinstance(a, Tap):
        common = "".join(c for c in left if c in result)  # axes of x that the layer sums over meet the same dy
        rows = jnp.einsum(f"{result}->{common}{new}", y)
        rows = a.watch(rows, jnp.einsum(f"{left}->{common}{contracted}", x))
        return jnp.einsum(f"{common}{new}->{result}", rows)
    if isinstance(a, Dropping):
        x, a = a.drop(x), a.a
    x, a, b = _widened(x, a, b)
    r = next(c for c in "rRzZqQ" if c not in equation)
    kept = "".join(c for c in left if c not in contracted)
    letters = left.replace("...", "." * (x.ndim - len(left.replace("...", ""))))  # one character per axis of x
    positions = [i for i, c in enumerate(letters) if c not in contracted]
    narrow = jnp.einsum(
        f"{left},{shared}{contracted}{r}->{kept}{r}", x, a, precision=_PRECISION,
        out_sharding=_narrow_sharding(x, positions),
    )  # fmt: skip
    wide = jnp.einsum(
        f"{kept}{r},{shared}{r}{new}->{result}", narrow, b, precision=_PRECISION, out_sharding=explicit_sharding(y)
    )
    return y + (scale * wide).astype(y.dtype)


def _widened(x: Array, a: Array, b: Array) -> tuple[Array, Array, Array]:
    dtype = jnp.promote_types(x.dtype, a.dtype)
    return x.astype(dtype), a.astype(dtype), b.astype(dtype)


def _narrow_sharding(x: Array, axes: list[int]) -> NamedSharding | None:
    """Return the sharding of a product that keeps these axes of x and adds one of size r, which stays whole."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return None
    spec = full_spec(sharding.spec, x.ndim)
    return sharding.update(spec=PartitionSpec(*(spec[i] for i in axes), None))
