"""The abstract array interface that `core` is written against.

A backend is one object with these methods. Arrays themselves bring arithmetic (`+ - * /`, comparisons), `abs`,
basic slicing, `.shape` and `.dtype`; everything else goes through `Ops`. Names are those of the Python array API
standard where it has one. The standard's own namespace is not enough: MLX has no thin SVD and no QR mode, and its
decompositions run on a CPU stream only.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np

# An array of whichever framework `ops` belongs to. The frameworks share no base class, so this is documentation.
Array = Any

P = ParamSpec("P")
R = TypeVar("R")


class Ops(Protocol):
    """What a framework must supply. All methods are pure, and batched over leading axes where that makes sense.

    No method hides randomness, device moves or precision: results live where the inputs live, and `matmul` is as
    precise as the dtype allows (no TF32, no bf16 passes), whatever the user's global flags say.

    A framework may offer one more, `compiled(function, static)`: see `as_one_program`.
    """

    name: str

    def asarray(self, x: np.ndarray, like: Array) -> Array:
        """`x` on the device of `like` and in its dtype."""
        ...

    def to_numpy(self, x: Array) -> np.ndarray:
        """A copy on the host. Narrow floats that NumPy does not know become float32."""
        ...

    def astype(self, x: Array, dtype: Any) -> Array:
        """`x` in the framework's own `dtype` (taken from another array's `.dtype`)."""
        ...

    def at_least_float32(self, x: Array) -> Array:
        """`x` itself if it is float32 or float64, else `x` as float32."""
        ...

    def eps(self, x: Array) -> float:
        """The spacing of 1.0 in the dtype of `x`."""
        ...

    def matmul(self, a: Array, b: Array) -> Array:
        """(..., m, k) @ (..., k, n) -> (..., m, n), at the highest precision of the dtype."""
        ...

    def matrix_transpose(self, x: Array) -> Array:
        """(..., m, n) -> (..., n, m)"""
        ...

    def qr(self, x: Array) -> tuple[Array, Array]:
        """Reduced QR of (..., m, k), m >= k: Q (..., m, k) with orthonormal columns, also where x is rank-deficient."""
        ...

    def svd(self, x: Array) -> tuple[Array, Array, Array]:
        """Thin SVD of (..., m, n), p = min(m, n): U (..., m, p), S (..., p) descending, V^T (..., p, n)."""
        ...

    def svdvals(self, x: Array) -> Array:
        """S of `svd` alone, for half of its time."""
        ...

    def cholesky_solve(self, gram: Array, rhs: Array) -> Array:
        """X with gram X = rhs, for symmetric positive definite gram (..., r, r) and rhs (..., r, n), whose leading
        axes broadcast.

        Where a matrix of the batch is not positive definite in the working precision, its X is NaN: never a number
        that looks like an answer.
        """
        ...

    def eye(self, n: int, like: Array) -> Array:
        """(n, n) identity on the device and in the dtype of `like`."""
        ...

    def zeros(self, shape: tuple[int, ...], like: Array) -> Array:
        """Zeros on the device and in the dtype of `like`."""
        ...

    def sqrt(self, x: Array) -> Array: ...

    def sum(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array: ...

    def max(self, x: Array, axis: int | None = None, keepdims: bool = False) -> Array: ...

    def isfinite(self, x: Array) -> Array: ...

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array: ...

    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array: ...


def as_one_program(
    ops: Ops, function: Callable[Concatenate[Ops, P], R], static: tuple[str, ...] = ()
) -> Callable[P, R]:
    """`function(ops, ...)` without its first argument, compiled once for each shape if `ops` can.

    For a framework whose eager operations are programs of their own, each to be compiled, that is most of a first call.

    Args:
        function: of this package: pure, and defined in a module, since what is compiled for it is kept.
        static: the arguments, to be given by name, that are no arrays.
    """
    compiled = getattr(ops, "compiled", None)
    made: Callable[P, R] = partial(function, ops) if compiled is None else compiled(function, static)
    return made
