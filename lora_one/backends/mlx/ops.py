"""`Ops` on MLX arrays. Decompositions run on the CPU stream, the only one where MLX has them, and copy nothing.

float64 exists on MLX's CPU device only. On GPUs with matrix units MLX multiplies float32 in TF32. It has no switch for
a single call, only MLX_ENABLE_TF32=0 for the process (https://github.com/ml-explore/mlx/issues/3860), so callers that
need float32 use the CPU stream, as `init` does.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from lora_one.core.ops import Ops

from .one_hot import OneHot, product


class MlxOps(Ops):
    """The array operations of `lora_one.core.ops.Ops`, on `mlx.core.array`.

    Pass an instance to the functions of `lora_one.core`, to use the algorithm on gradients of your own. It has no
    settings and no state. Decompositions run on the CPU; put `mx.stream(mx.cpu)` around the calls if products must be
    in full float32 on a GPU too.

    Attributes:
        name: "mlx".

    >>> import mlx.core as mx
    >>> ops = MlxOps()
    >>> u, s, vt = ops.svd(mx.array([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    >>> u.shape, s.tolist(), vt.shape
    ((2, 2), [3.0, 2.0], (2, 3))
    """

    name = "mlx"

    def asarray(self, x: np.ndarray, like: mx.array) -> mx.array:
        return mx.array(np.ascontiguousarray(x).reshape(np.shape(x)), dtype=like.dtype)

    def to_numpy(self, x: mx.array) -> np.ndarray:
        return np.array(x.astype(mx.float32) if x.dtype in (mx.bfloat16, mx.float16) else x)

    def astype(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        return x.astype(dtype)

    def at_least_float32(self, x: mx.array) -> mx.array:
        return x if x.dtype in (mx.float32, mx.float64) else x.astype(mx.float32)

    def eps(self, x: mx.array) -> float:
        return float(mx.finfo(x.dtype).eps)

    def matmul(self, a: mx.array, b: mx.array) -> mx.array:
        return product(a, b) if isinstance(a, OneHot) or isinstance(b, OneHot) else a @ b

    def matrix_transpose(self, x: mx.array) -> mx.array:
        return x.swapaxes(-1, -2)

    def qr(self, x: mx.array) -> tuple[mx.array, mx.array]:
        q, r = mx.linalg.qr(x, stream=mx.cpu)
        return q, r

    def svd(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        rows, columns = x.shape[-2:]
        if rows < columns:
            u, s, vt = self.svd(self.matrix_transpose(x))
            return self.matrix_transpose(vt), s, self.matrix_transpose(u)
        if rows == columns:
            u, s, vt = mx.linalg.svd(x, stream=mx.cpu)
            return u, s, vt
        # MLX's svd returns all of U, (rows, rows): take that of R, which is square.
        q, r = self.qr(x)  # (..., rows, columns), (..., columns, columns)
        u, s, vt = mx.linalg.svd(r, stream=mx.cpu)
        return q @ u, s, vt

    def svdvals(self, x: mx.array) -> mx.array:
        s: Any = mx.linalg.svd(x, compute_uv=False, stream=mx.cpu)  # MLX's stub says (u, s, vt)
        return s

    def cholesky_solve(self, gram: mx.array, rhs: mx.array) -> mx.array:
        with mx.stream(mx.cpu):  # the whole batch goes to the CPU and back once
            identity = mx.eye(gram.shape[-1], dtype=gram.dtype)
            lower = mx.linalg.cholesky(gram)  # (..., r, r)
            valid = _is_cholesky(lower, gram)[..., None, None]
            inverse = mx.linalg.tri_inv(mx.where(valid, lower, identity))  # tri_inv raises for a singular matrix
            solution = inverse.swapaxes(-1, -2) @ (inverse @ rhs)
            return mx.where(valid, solution, mx.array(float("nan"), dtype=gram.dtype))

    def eye(self, n: int, like: mx.array) -> mx.array:
        return mx.eye(n, dtype=like.dtype)

    def zeros(self, shape: tuple[int, ...], like: mx.array) -> mx.array:
        return mx.zeros(shape, dtype=like.dtype)

    def sqrt(self, x: mx.array) -> mx.array:
        return mx.sqrt(x)

    def sum(self, x: mx.array, axis: int | None = None) -> mx.array:
        return mx.sum(x, axis=axis)

    def max(self, x: mx.array, axis: int | None = None) -> mx.array:
        return mx.max(x, axis=axis)

    def isfinite(self, x: mx.array) -> mx.array:
        return mx.isfinite(x)

    def where(self, condition: mx.array, x: mx.array, y: mx.array) -> mx.array:
        return mx.where(condition, x, y)

    def concat(self, xs: Sequence[mx.array], axis: int = 0) -> mx.array:
        return mx.concatenate(list(xs), axis=axis)

    def stack(self, xs: Sequence[mx.array], axis: int = 0) -> mx.array:
        return mx.stack(list(xs), axis=axis)


def _is_cholesky(lower: mx.array, gram: mx.array) -> mx.array:
    """Return whether each matrix of `lower` is the Cholesky factor of its `gram`: (...,), bool.

    MLX drops LAPACK's error flag, and returns what the factorisation had written when it stopped. LAPACK leaves the
    pivot that was not positive on the diagonal. Other implementations may not, so the product is checked too.
    """
    pivots = mx.diagonal(lower, axis1=-2, axis2=-1)  # (..., r)
    size = mx.diagonal(gram, axis1=-2, axis2=-1)  # (..., r)
    # A completed factorisation has |gram - L L^T| <= c r eps sqrt(gram_ii gram_jj) (Higham 2002, Theorem 10.3).
    error = mx.abs(lower @ lower.swapaxes(-1, -2) - gram)
    scale = mx.sqrt(mx.abs(size))
    bound = 8.0 * (gram.shape[-1] + 1) * float(mx.finfo(gram.dtype).eps) * scale[..., :, None] * scale[..., None, :]
    return mx.all(pivots > 0, axis=-1) & mx.all(error <= bound, axis=(-2, -1))
