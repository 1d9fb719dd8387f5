"""The array interface that `core` is written against.

A backend is one object with the methods of `Ops`. The arrays themselves bring arithmetic (`+ - * /`, comparisons),
`abs`, `&` of booleans, basic slicing, `.shape` and `.dtype`; everything else goes through `Ops`. Names are those of the
Python array API standard where it has one. The namespace of the standard itself is not enough: MLX has no thin SVD and
no QR mode, and its decompositions run on a CPU stream only.
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
    """The operations that a framework must supply.

    All methods are pure, and work on any number of leading batch axes where that makes sense. No method hides
    randomness, device moves or precision: results stay on the device of the inputs, and `matmul` is as precise as the
    dtype allows (no TF32, no bf16 passes), whatever the user's global flags say.

    `compiled` has a default. An object that does not inherit from this class may leave it out.
    """

    name: str

    def asarray(self, x: np.ndarray, like: Array) -> Array:
        """Return `x` on the device of `like` and in its dtype."""
        ...

    def to_numpy(self, x: Array) -> np.ndarray:
        """Return a copy on the host. Narrow floats that NumPy does not know become float32."""
        ...

    def astype(self, x: Array, dtype: Any) -> Array:
        """Return `x` in `dtype`, a dtype of the framework that was read from the `.dtype` of another array."""
        ...

    def at_least_float32(self, x: Array) -> Array:
        """Return `x` itself if it is float32 or float64, else `x` as float32."""
        ...

    def eps(self, x: Array) -> float:
        """Return the distance from 1.0 to the next larger number in the dtype of `x`."""
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
        """Return only S of `svd`, in half of its time."""
        ...

    def cholesky_solve(self, gram: Array, rhs: Array) -> Array:
        """X with gram X = rhs, for symmetric positive definite gram (..., r, r) and rhs (..., r, n), whose leading
        axes broadcast.

        Where a matrix of the batch is not positive definite in the working precision, its X is NaN: never a number
        that looks like an answer.
        """
        ...

    def eye(self, n: int, like: Array) -> Array:
        """Return the (n, n) identity on the device and in the dtype of `like`."""
        ...

    def zeros(self, shape: tuple[int, ...], like: Array) -> Array:
        """Return zeros on the device and in the dtype of `like`."""
        ...

    def sqrt(self, x: Array) -> Array: ...

    def sum(self, x: Array, axis: int | None = None) -> Array: ...

    def max(self, x: Array, axis: int | None = None) -> Array: ...

    def isfinite(self, x: Array) -> Array: ...

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """Return x where a boolean array is true and y elsewhere, entry by entry; the three broadcast."""
        ...

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array: ...

    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array: ...

    def compiled(self, function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
        """Return `function(ops, ...)` without its first argument, compiled if the framework gains by it.

        Called through `as_one_program`, which describes the arguments. The default compiles nothing.
        """
        return partial(function, self)


def as_one_program(
    ops: Ops, function: Callable[Concatenate[Ops, P], R], static: tuple[str, ...] = ()
) -> Callable[P, R]:
    """Return `function(ops, ...)` without its first argument, compiled once per shape if `ops` can compile.

    Some frameworks compile every eager operation as a program of its own. For them, compiling the whole function saves
    most of the time of a first call.

    Args:
        function: a pure function of this package, defined at the top level of a module: the compiled one is kept for
            as long as the process runs.
        static: names of the arguments that are not arrays. They must be passed by keyword.
    """
    if not hasattr(ops, "compiled"):  # an object of the user's own, which need not inherit from `Ops`
        return partial(function, ops)
    return ops.compiled(function, static)
