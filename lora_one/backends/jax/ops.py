"""`Ops` on JAX arrays on any device or mesh, traced or not."""

import operator
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_one.core.ops import Ops

from .placement import full_spec, put, replicated

_NARROW = ("bfloat16", "float16")  # NumPy lacks the first, and computes slowly in the second


class JaxOps(Ops):
    """The operations of `lora_one.core.ops.Ops` on `jax.Array`.

    Use it to run the algorithm of `lora_one.core` on JAX arrays of your own; `lora_one.backends.jax.ops` is one such
    object. Results lie where the arguments lie, sharded arrays included, and products run at the highest precision of
    the dtype, whatever JAX's flags say. All methods work inside `jax.jit` except `to_numpy`, which copies to the host.

    Example:
        >>> import jax.numpy as jnp
        >>> from lora_one.backends.jax import JaxOps
        >>> ops = JaxOps()
        >>> u, s, vt = ops.svd(jnp.diag(jnp.array([3.0, 2.0, 1.0])))
        >>> [round(float(value), 3) for value in s]
        [3.0, 2.0, 1.0]
    """

    name = "jax"

    def compiled(self, function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
        return _compiled(function, static)

    def asarray(self, x: np.ndarray, like: Array) -> Array:
        # NumPy narrows first: a float64 array would promote others under x64, and JAX would warn without x64.
        narrow = np.asarray(x).astype(like.dtype)
        # A tracer has no device, and an array beside one on JAX's default device should not be bound to that device.
        if isinstance(like, jax.core.Tracer) or not like.committed:
            return jnp.asarray(narrow)
        return put(narrow, replicated(like.sharding))

    def to_numpy(self, x: Array) -> np.ndarray:
        host = np.array(x)
        return host.astype(np.float32) if host.dtype.kind == "V" or host.dtype.name in _NARROW else host

    def astype(self, x: Array, dtype: Any) -> Array:
        return x.astype(dtype)

    def at_least_float32(self, x: Array) -> Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def eps(self, x: Array) -> float:
        return float(jnp.finfo(x.dtype).eps)

    def matmul(self, a: Array, b: Array) -> Array:
        if 0 < a.shape[-1] <= _MAX_SPELT_OUT and jnp.result_type(a, b).itemsize >= 4:
            return _outer_products(a, b)
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST, out_sharding=_product_sharding(a, b))

    def matrix_transpose(self, x: Array) -> Array:
        return jnp.matrix_transpose(x)

    def qr(self, x: Array) -> tuple[Array, Array]:
        with jax.default_matmul_precision("highest"):
            q, r = jnp.linalg.qr(x, mode="reduced")
        return q, r

    def svd(self, x: Array) -> tuple[Array, Array, Array]:
        with jax.default_matmul_precision("highest"):
            u, s, vt = lax.linalg.svd(x, full_matrices=False, algorithm=_svd_algorithm())
        return u, s, vt

    def svdvals(self, x: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            s: Array = lax.linalg.svd(x, full_matrices=False, compute_uv=False, algorithm=_svd_algorithm())
        return s

    def cholesky_solve(self, gram: Array, rhs: Array) -> Array:
        rhs = jnp.broadcast_to(rhs, (*gram.shape[:-2], *rhs.shape[-2:]))
        if gram.ndim == 2 or gram.shape[-1] <= _MAX_BATCHED_ROWS:
            return _cholesky_solve(gram, rhs)
        if gram.shape[:-2] == (2,):  # the two Grams of a pair: this compiles faster than a loop
            return jnp.stack([_cholesky_solve(gram[i], rhs[i]) for i in range(2)])
        return lax.platform_dependent(gram, rhs, cpu=_cholesky_solve_in_turn, default=_cholesky_solve)

    def eye(self, n: int, like: Array) -> Array:
        return jnp.eye(n, dtype=like.dtype)

    def zeros(self, shape: tuple[int, ...], like: Array) -> Array:
        return jnp.zeros(shape, dtype=like.dtype)

    def sqrt(self, x: Array) -> Array:
        return jnp.sqrt(x)

    def sum(self, x: Array, axis: int | None = None) -> Array:
        return jnp.sum(x, axis=axis)

    def max(self, x: Array, axis: int | None = None) -> Array:
        return jnp.max(x, axis=axis)

    def isfinite(self, x: Array) -> Array:
        return jnp.isfinite(x)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return jnp.where(condition, x, y)

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return jnp.concatenate(list(xs), axis=axis)

    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return jnp.stack(list(xs), axis=axis)


@cache
def _compiled(function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
    made: Callable[..., Any] = jax.jit(partial(function, JaxOps()), static_argnames=static)
    return made


def _svd_algorithm() -> lax.linalg.SvdAlgorithm:
    """Return QR on a GPU: for small matrices XLA uses Jacobi's there, whose vectors are less orthonormal."""
    algorithms = lax.linalg.SvdAlgorithm
    return algorithms.QR if jax.default_backend() == "gpu" else algorithms.DEFAULT


# Batches of larger matrices may wait for each other for ever on a CPU: see `_cholesky_solve_in_turn`.
_MAX_BATCHED_ROWS = 16


def _cholesky_solve(gram: Array, rhs: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        lower = jnp.linalg.cholesky(gram)  # NaN if there is no such factor, and then X is NaN too
        half = lax.linalg.triangular_solve(lower, rhs, left_side=True, lower=True)
        return lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)


def _cholesky_solve_in_turn(gram: Array, rhs: Array) -> Array:
    """Solve for one matrix of a batch after the other.

    On a CPU with two threads, batches of several layers with r >= 32 wait for each other in XLA's thread pool for ever
    (jax 0.10.2; not with 0.11.2).
    """
    systems = gram.reshape(-1, *gram.shape[-2:]), rhs.reshape(-1, *rhs.shape[-2:])
    return lax.map(lambda system: _cholesky_solve(*system), systems).reshape(rhs.shape)


# The most outer products that a product is written as. Each one must be compiled; with more, a dot is faster.
_MAX_SPELT_OUT = 8


@jax.jit
def _outer_products(a: Array, b: Array) -> Array:
    """Return a @ b, (..., m, k) and (..., k, n), as the sum of k outer products.

    XLA computes it inside the next elementwise operation (Adam's moments). The result of a dot would be written to
    memory and read again.
    """
    terms = [a[..., :, k, None] * b[..., k, None, :] for k in range(a.shape[-1])]
    return reduce(operator.add, terms)


def _product_sharding(a: Array, b: Array) -> NamedSharding | None:
    """Return where a @ b goes on a mesh with Explicit axes, which must be said for sharded sums; None elsewhere."""
    shardings: list[Any] = [getattr(jax.typeof(x), "sharding", None) for x in (a, b)]
    mesh = next((s.mesh for s in shardings if s is not None and AxisType.Explicit in (s.mesh.axis_types or ())), None)
    if mesh is None:
        return None
    left, right = (full_spec(sharding.spec, x.ndim) for sharding, x in zip(shardings, (a, b), strict=True))
    batch = max(left[:-2], right[:-2], key=len)
    column = right[-1] if right[-1] != left[-2] else None
    return NamedSharding(mesh, PartitionSpec(*batch, left[-2], column))
