"""How much a computation magnifies rounding, found by running the spec itself with noise: Monte Carlo arithmetic.

Every primitive of `NoisyOps` returns a random one of the results that a backward stable implementation could return in
the working precision (Parker 1997, Monte Carlo Arithmetic; sums of k products err like sqrt(k): Higham and Mary 2019,
SIAM J. Sci. Comput. 41). The spread of the results over eps is the condition number of the whole computation, including
its inner cancellations. A tolerance is that number times the eps of a dtype: derived, not tuned to the frameworks.
"""

import numpy as np

from lora_one.backends.numpy.ops import NumpyOps


class WorkingOps(NumpyOps):
    """NumPy in float64, except that it reports the eps of a given working precision."""

    def __init__(self, working_eps: float):
        self._working_eps = working_eps

    def eps(self, x: np.ndarray) -> float:
        return self._working_eps


class NoisyOps(WorkingOps):
    """The primitives of NumPy with random backward errors of the size of the working precision's eps."""

    def __init__(self, working_eps: float, seed: int):
        super().__init__(working_eps)
        self._random = np.random.default_rng(seed)

    def _noise(self, size: np.ndarray) -> np.ndarray:
        return self._working_eps * size * self._random.uniform(-1.0, 1.0, np.shape(size))

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        product = super().matmul(a, b)
        return product + self._noise(np.sqrt(a.shape[-1]) * super().matmul(np.abs(a), np.abs(b)))

    def qr(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Householder QR is backward stable column by column (Higham 2002, Theorem 19.4).
        columns = np.linalg.norm(x, axis=-2, keepdims=True) * _orthogonal_error(x)
        q, r = super().qr(x + self._noise(columns))
        return q + self._noise(_orthogonal_error(q)), r + self._noise(np.abs(r))

    def svd(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, s, vt = super().svd(self._perturbed(x))
        left, right = _orthogonal_error(u), _orthogonal_error(vt.swapaxes(-1, -2)).swapaxes(-1, -2)
        return u + self._noise(left), s, vt + self._noise(right)

    def svdvals(self, x: np.ndarray) -> np.ndarray:
        return super().svdvals(self._perturbed(x))

    def _perturbed(self, x: np.ndarray) -> np.ndarray:
        """Return a matrix near x, whose exact SVD a backward stable algorithm could return for x."""
        largest = np.linalg.norm(x, 2, axis=(-2, -1), keepdims=True) * _orthogonal_error(x)
        return x + self._noise(largest)

    def cholesky_solve(self, gram: np.ndarray, rhs: np.ndarray) -> np.ndarray:
        # Backward error of a Cholesky factorisation: c(r) eps sqrt(g_ii g_jj) (Higham 2002, Theorem 10.3).
        size = np.sqrt(np.abs(np.diagonal(gram, axis1=-2, axis2=-1)))
        error = self._noise(np.sqrt(gram.shape[-1]) * size[..., :, None] * size[..., None, :])
        symmetric = (error + np.swapaxes(error, -1, -2)) / 2.0
        return super().cholesky_solve(gram + symmetric, rhs + self._noise(np.abs(rhs)))

    def sqrt(self, x: np.ndarray) -> np.ndarray:
        root = super().sqrt(x)
        return root + self._noise(np.abs(root))

    def sum(self, x: np.ndarray, axis: int | None = None) -> np.ndarray:
        terms = x.size if axis is None else x.shape[axis]
        size = np.sqrt(terms) * super().sum(np.abs(x), axis=axis)
        return super().sum(x, axis=axis) + self._noise(size)

    def at_least_float32(self, x: np.ndarray) -> np.ndarray:
        return x + self._noise(np.abs(x))


def _orthogonal_error(x: np.ndarray) -> np.ndarray:
    """The error of min(m, n) reflections on a unit entry of x, (..., m, n), in eps: the square root of their number."""
    return np.full_like(x, np.sqrt(min(x.shape[-2:])))
