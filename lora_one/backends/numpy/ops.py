"""`Ops` on NumPy: the reference. In float64 it computes the numbers that all other backends are compared with."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_one.core.ops import Ops


class NumpyOps(Ops):
    """See `lora_one.core.ops.Ops`."""

    name = "numpy"

    def asarray(self, x: np.ndarray, like: np.ndarray) -> np.ndarray:
        return np.asarray(x, dtype=like.dtype)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        return np.array(x)

    def astype(self, x: np.ndarray, dtype: Any) -> np.ndarray:
        return np.asarray(x).astype(dtype)

    def at_least_float32(self, x: np.ndarray) -> np.ndarray:
        return x if x.dtype.itemsize >= 4 else x.astype(np.float32)

    def eps(self, x: np.ndarray) -> float:
        return float(np.finfo(x.dtype).eps)

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a @ b

    def matrix_transpose(self, x: np.ndarray) -> np.ndarray:
        return np.swapaxes(x, -1, -2)

    def qr(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q, r = np.linalg.qr(x)
        return q, r

    def svd(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        return u, s, vt

    def svdvals(self, x: np.ndarray) -> np.ndarray:
        return np.linalg.svd(x, compute_uv=False)

    def cholesky_solve(self, gram: np.ndarray, rhs: np.ndarray) -> np.ndarray:
        lower = _cholesky_or_nan(gram)
        half = np.linalg.solve(lower, rhs)
        return np.linalg.solve(np.swapaxes(lower, -1, -2), half)

    def eye(self, n: int, like: np.ndarray) -> np.ndarray:
        return np.eye(n, dtype=like.dtype)

    def zeros(self, shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
        return np.zeros(shape, dtype=like.dtype)

    def sqrt(self, x: np.ndarray) -> np.ndarray:
        return np.sqrt(x)

    def sum(self, x: np.ndarray, axis: int | None = None) -> np.ndarray:
        return np.sum(x, axis=axis)

    def max(self, x: np.ndarray, axis: int | None = None) -> np.ndarray:
        return np.max(x, axis=axis)

    def isfinite(self, x: np.ndarray) -> np.ndarray:
        return np.isfinite(x)

    def where(self, condition: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(condition, x, y)

    def concat(self, xs: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
        return np.concatenate(xs, axis=axis)

    def stack(self, xs: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
        return np.stack(xs, axis=axis)


def _cholesky_or_nan(gram: np.ndarray) -> np.ndarray:
    """Lower Cholesky factors of (..., r, r), NaN for each matrix that has none. NumPy rejects the whole batch then."""
    try:
        return np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        if gram.ndim == 2:
            return np.full_like(gram, np.nan)
        return np.stack([_cholesky_or_nan(matrix) for matrix in gram])
