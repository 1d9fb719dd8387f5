"""`Ops` on JAX arrays, on whatever device or mesh they are, traced or not."""

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


class JaxOps(Ops):
    """See `lora_one.core.ops.Ops`."""

    name = "jax"

    def compiled(self, function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
        return _compiled(function, static)

    def asarray(self, x: np.ndarray, like: Array) -> Array:
        # NumPy narrows first: under x64 a float64 array would promote what it meets, without it warn.
        narrow = np.asarray(x).astype(like.dtype)
        # A tracer has no place of its own, and what lies on the default device by default should go on doing so.
        if isinstance(like, jax.core.Tracer) or not like.committed:
            return jnp.asarray(narrow)
        return jax.device_put(narrow, _placement(like))

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
        if 0 < a.shape[-1] <= _FEW and jnp.result_type(a, b).itemsize >= 4:
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
        if gram.ndim == 2 or gram.shape[-1] <= _QUICK:
            return _cholesky_solve(gram, rhs)
        if gram.shape[:-2] == (2,):  # the two Grams of a pair: compiled in less time than a loop is
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

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return jnp.concatenate(list(xs), axis=axis)

    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return jnp.stack(list(xs), axis=axis)


@cache
def _compiled(function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
    made: Callable[..., Any] = jax.jit(partial(function, JaxOps()), static_argnames=static)
    return made


def _svd_algorithm() -> lax.linalg.SvdAlgorithm:
    """On a GPU XLA takes Jacobi's for small matrices, which leaves vectors less orthonormal than LAPACK does."""
    algorithms = lax.linalg.SvdAlgorithm
    return algorithms.QR if jax.default_backend() == "gpu" else algorithms.DEFAULT


# Rows up to which batches of decompositions were never seen to wait for each other.
_QUICK = 16


def _cholesky_solve(gram: Array, rhs: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        lower = jnp.linalg.cholesky(gram)  # a factor that does not exist is NaN, and so is all that is solved with it
        half = lax.linalg.triangular_solve(lower, rhs, left_side=True, lower=True)
        return lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)


def _cholesky_solve_in_turn(gram: Array, rhs: Array) -> Array:
    """One matrix of a batch after the other: on a CPU with two threads batches of r = 32 or more, of several layers,
    wait for each other in XLA's pool for ever (jax 0.10.2; with 0.11.2 they do not)."""
    matrices = gram.reshape(-1, *gram.shape[-2:]), rhs.reshape(-1, *rhs.shape[-2:])
    return lax.map(lambda its: _cholesky_solve(*its), matrices).reshape(rhs.shape)


# Terms up to which a product is spelt out. Each is an operation to compile; beyond, arithmetic is what counts.
_FEW = 8


@jax.jit
def _outer_products(a: Array, b: Array) -> Array:
    """a @ b as the sum of k outer products, (..., m, k) and (..., k, n).

    XLA computes it inside whatever elementwise operation comes next (Adam's moments), where a dot's result would be
    written to memory and read again.
    """
    terms = [a[..., :, k, None] * b[..., k, None, :] for k in range(a.shape[-1])]
    return reduce(operator.add, terms)


def _product_sharding(a: Array, b: Array) -> Any:
    """On a mesh with Explicit axes a product must say where it goes if it sums over a sharded axis; None elsewhere."""
    shardings: list[Any] = [getattr(jax.typeof(x), "sharding", None) for x in (a, b)]
    mesh = next((s.mesh for s in shardings if s is not None and AxisType.Explicit in (s.mesh.axis_types or ())), None)
    if mesh is None:
        return None
    left, right = ((*s.spec, *[None] * (x.ndim - len(s.spec))) for s, x in zip(shardings, (a, b), strict=True))
    batch = max(left[:-2], right[:-2], key=len)
    column = right[-1] if right[-1] != left[-2] else None
    return NamedSharding(mesh, PartitionSpec(*batch, left[-2], column))


_NARROW = ("bfloat16", "float16")


def _placement(like: Array) -> Any:
    """Where an array of another shape goes to be with `like`: its device, or its whole mesh, replicated."""
    sharding = like.sharding
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding
