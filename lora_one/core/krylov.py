"""The leading singular triplets of a matrix in memory, to rounding error: block Golub-Kahan bidiagonalisation.

Orthonormal blocks V_1, Q_1, V_2, Q_2, ... are found by turns, each from the product of G or G^T with the one before it,
such that

    G [V_1 ... V_j] = [Q_1 ... Q_j] H,  H block bidiagonal
    G^T Q_j = [V_1 ... V_j] (...) + V_{j+1} R

(Golub, Luk and Overton 1981; how fast it converges: Musco and Musco 2015, arXiv 1504.05477). A triplet (u, s, v) of H,
times the blocks, satisfies G v = s u by construction and fails G^T u = s v by V_{j+1} R u_j alone, where u_j is the
part of u that belongs to Q_j. So the next block, which is needed anyway, says how exact the triplets are.
"""

import math

import numpy as np

from .gradient import Gradient, times, transposed_times
from .ops import Array, Ops, largest_entry

LAPACK_RESIDUAL = 16.0  # in units of eps s_1: ||G^T u_i - s_i v_i|| by LAPACK's float32 SVD of a 2048 x 768 gradient
NOTHING_NEW = 4.0  # in units of eps ||G||: what is left of a vector below this length is rounding noise


def leading_triplets(ops: Ops, g: Gradient, omega: Array, rank: int, limit: int) -> tuple[Array, Array, Array] | None:
    """The `rank` leading singular triplets of G, as exact as a dense SVD's.

    When it is done depends on the values: this cannot be traced.

    Args:
        g: (out, in), float32 or wider; or a stack of matrices, (..., out, in), which go on until all are done.
        omega: Gaussian, (in, k), k >= rank: the same for all.
        limit: directions that may be tried.

    Returns:
        U (out, r), S (r,), V^T (r, in), where a vector of a zero singular value may be zero, of a stack with its
        leading axis; or None where `limit` directions do not do.
    """
    k = omega.shape[-1]
    v, _ = ops.qr(omega)  # (in, k)
    q, h = ops.qr(times(ops, g, v))  # (out, k), (k, k)
    floor = NOTHING_NEW * ops.eps(v) * largest_entry(ops, h)
    q, h = _without_noise(ops, q, h, floor)
    right, left = v + ops.zeros((*h.shape[:-2], 1, 1), like=v), q  # (in, K), (out, K)
    checks = _Checks()
    while True:
        last = left.shape[-1] + k > limit
        v, r = _new_block(ops, transposed_times(ops, g, q), right, floor)  # (in, k), (k, k)
        if checks.due() or last:
            u, s, vt = ops.svd(h)
            residual = _largest(ops, ops.matmul(r, u[..., -k:, :rank]), s[..., 0])
            if checks.passed(residual / (LAPACK_RESIDUAL * ops.eps(v))):
                vt = ops.matmul(vt[..., :rank, :], ops.matrix_transpose(right))
                return ops.matmul(left, u[..., :rank]), s[..., :rank], vt
        if last:
            return None
        right = ops.concat([right, v], axis=-1)
        h = ops.matrix_transpose(_below(ops, ops.matrix_transpose(h), r))  # (K, K + k)
        q, r = _new_block(ops, times(ops, g, v), left, floor)  # (out, k), (k, k)
        left = ops.concat([left, q], axis=-1)
        h = _below(ops, h, r)  # (K, K)


class _Checks:
    """When to look whether triplets are exact: an SVD of all directions so far costs more than a few more of them."""

    def __init__(self) -> None:
        self._step = 0
        self._next = 1
        self._before: tuple[int, float] | None = None  # the last look, and what it saw

    def due(self) -> bool:
        """Count a step, and say whether to look after it."""
        self._step += 1
        return self._step >= self._next

    def passed(self, residual: float) -> bool:
        """Whether a residual, in units of what is allowed, is. If not, foretell when: it falls by a factor a step."""
        if not 1.0 < residual < math.inf:  # what is no number will be seen by whoever asked
            return True
        to_go = 1.0
        if self._before is not None:
            step, before = self._before
            a_step = math.log(before / residual) / (self._step - step)
            to_go = math.log(residual) / a_step if a_step > 0.0 else math.inf
        # Early on it falls slowly, and foretells too much: no more than half of the steps that were made.
        self._next = self._step + max(1, int(min(to_go, self._step / 2)))
        self._before = self._step, residual
        return False


def _below(ops: Ops, h: Array, r: Array) -> Array:
    """h, (p, q), with the rows [0 r], (k, q), under it."""
    k = r.shape[-2]
    row = ops.concat([ops.zeros((*h.shape[:-2], k, h.shape[-1] - k), like=h), r], axis=-1)
    return ops.concat([h, row], axis=-2)


def _new_block(ops: Ops, x: Array, known: Array, floor: Array) -> tuple[Array, Array]:
    """Orthonormal q, (n, k), and r with x = known (...) + q r; columns of q are zero where x has nothing new."""
    q, r = ops.qr(split_by_projection(ops, x, known)[0])
    identity = ops.eye(r.shape[-1], like=r)
    for _ in range(3):
        q, again = ops.qr(split_by_projection(ops, q, known)[0])
        r = ops.matmul(again, r)
        # Twice is enough (Kahan; Parlett 1980), unless a first column was itself rounding noise, mostly inside `known`.
        if float(ops.to_numpy(ops.max(-abs(ops.sum(again * identity, axis=-2))))) < -0.5:
            break
    return _without_noise(ops, q, r, floor)


def split_by_projection(ops: Ops, x: Array, known: Array) -> tuple[Array, Array]:
    """x, (n, k), less its projection on the orthonormal `known`, (n, K), and the coordinates of that, (K, k)."""
    coordinates = ops.matmul(ops.matrix_transpose(known), x)
    return x - ops.matmul(known, coordinates), coordinates


def _without_noise(ops: Ops, q: Array, r: Array, floor: Array) -> tuple[Array, Array]:
    """Zero columns of q, and rows of r, where the row of r is all noise: q there would be an arbitrary direction."""
    keep = ops.astype(ops.max(abs(r), axis=-1) > floor[..., None], r.dtype)  # (k,)
    return q * keep[..., None, :], r * keep[..., :, None]


def _largest(ops: Ops, x: Array, unit: Array) -> float:
    """The largest column's norm over `unit`, of all matrices; 0 where that is 0."""
    columns, one = ops.to_numpy(x).astype(np.float64), ops.to_numpy(unit)[..., None, None]
    columns = np.divide(columns, one, out=np.zeros_like(columns), where=one > 0.0)  # before squares can overflow
    return float(np.linalg.norm(columns, axis=-2).max())
