"""Linear algebra of the oracle: textbook formulas in long double, and LAPACK's other SVD."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg

Long = np.longdouble
Inputs = Sequence[np.ndarray]
Params = Mapping[str, Any]


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Invert (..., r, r) by Gauss-Jordan with pivoting, in the precision of the argument."""
    if matrix.ndim > 2:
        return np.stack([inverse(x) for x in matrix])
    n = len(matrix)
    work = np.concatenate([matrix, np.eye(n, dtype=matrix.dtype)], axis=1)
    for column in range(n):
        pivot = column + int(np.argmax(np.abs(work[column:, column])))
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = work[column] / work[column, column]
        for row in range(n):
            if row != column:
                work[row] = work[row] - work[row, column] * work[column]
    return work[:, n:]


def gesvd(g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD by LAPACK's gesvd. NumPy, which the spec runs on, calls gesdd."""
    u, s, vt = scipy.linalg.svd(g, full_matrices=False, lapack_driver="gesvd")
    return u, s, vt
