"""x A B beside a base layer's x W, in the shapes that Flax's layers have.

Factors are lora_a (stack..., in..., r) and lora_b (stack..., r, out...). Products run in the wider of the input's and
the factors' dtype and at the highest precision: rank r is small beside the base product, and a sketch reads these
products as numbers. On a mesh with Explicit axes, where a product over a sharded axis must say where its result goes,
the narrow one goes where x is, whole along r, and the result where the base layer's output is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from .layout import einsum_groups

_PRECISION = lax.Precision.HIGHEST


def add_general(
    y: Array, x: Array, a: Array, b: Array, scale: float, axis: tuple[int, ...], batch_axis: tuple[int, ...] = ()
) -> Array:
    """y + scale * x a b for a layer that contracts `axis` of x, and shares `batch_axis` with its kernel.

    Args:
        y: the base layer's output, (batch..., rest..., out...); comes back in its dtype.
        axis, batch_axis: not negative.
    """
    x, a, b = _widened(x, a, b)
    n = len(batch_axis)
    lead = tuple(range(n))
    rest = [i for i in range(x.ndim) if i not in axis and i not in batch_axis]
    narrow = lax.dot_general(
        x,
        a,
        ((axis, tuple(range(n, n + len(axis)))), (batch_axis, lead)),
        precision=_PRECISION,
        out_sharding=_narrow_sharding(x, [*batch_axis, *rest]),
    )  # (batch..., rest..., r)
    wide = lax.dot_general(
        narrow, b, (((narrow.ndim - 1,), (n,)), (lead, lead)), precision=_PRECISION, out_sharding=_sharding(y)
    )
    return y + (scale * wide).astype(y.dtype)


def add_einsum(y: Array, x: Array, a: Array, b: Array, scale: float, equation: str) -> Array:
    """y + scale * (the layer's own einsum of x with a b in the place of the kernel), in the dtype of y."""
    x, a, b = _widened(x, a, b)
    inputs, result = equation.replace(" ", "").split("->")
    left = inputs.split(",")[0]
    shared, contracted, new = einsum_groups(equation)
    r = next(c for c in "rRzZqQ" if c not in equation)
    kept = "".join(c for c in left if c not in contracted)
    letters = left.replace("...", "." * (x.ndim - len(left.replace("...", ""))))  # one character an axis of x
    positions = [i for i, c in enumerate(letters) if c not in contracted]
    narrow = jnp.einsum(
        f"{left},{shared}{contracted}{r}->{kept}{r}", x, a, precision=_PRECISION,
        out_sharding=_narrow_sharding(x, positions),
    )  # fmt: skip
    wide = jnp.einsum(
        f"{kept}{r},{shared}{r}{new}->{result}", narrow, b, precision=_PRECISION, out_sharding=_sharding(y)
    )
    return y + (scale * wide).astype(y.dtype)


def _widened(x: Array, a: Array, b: Array) -> tuple[Array, Array, Array]:
    dtype = jnp.promote_types(x.dtype, a.dtype)
    return x.astype(dtype), a.astype(dtype), b.astype(dtype)


def _sharding(x: Array) -> Any:
    """The sharding of x as a type, on a mesh with Explicit axes; None elsewhere, where the compiler decides."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    types = getattr(getattr(sharding, "mesh", None), "axis_types", None) or ()
    return sharding if AxisType.Explicit in types else None


def _narrow_sharding(x: Array, axes: list[int]) -> Any:
    sharding = _sharding(x)
    if sharding is None:
        return None
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    return sharding.update(spec=PartitionSpec(*(spec[i] for i in axes), None))
