"""The leading singular triplets of a matrix in memory, to rounding error: block Golub-Kahan bidiagonalisation.

Orthonormal blocks V_1, Q_1, V_2, Q_2, ... are computed alternately, each from the product of G or G^T with the block
before it, such that

    G [V_1 ... V_j] = [Q_1 ... Q_j] H,  H block bidiagonal
    G^T Q_j = [V_1 ... V_j] (...) + V_{j+1} R

(Golub, Luk and Overton 1981; how fast it converges: Musco and Musco 2015, arXiv 1504.05477). Take a triplet (u, s, v)
of H and multiply its vectors by the blocks. Then G v = s u holds by construction, and G^T u = s v fails only by
V_{j+1} R u_j, where u_j is the part of u that belongs to Q_j. The next block is needed anyway, so the error of the
triplets comes for free.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .arrays import diagonal, largest_entry, split_by_projection
from .gradient import Gradient, times, transposed_times
from .ops import Array, Ops
from .stacking import one_of, stack_of, stacked

LAPACK_RESIDUAL = 16.0  # in units of eps s_1: ||G^T u_i - s_i v_i|| by LAPACK's float32 SVD of a 2048 x 768 gradient
NOISE_LEVEL = 4.0  # in units of eps ||G||: a vector shorter than this consists of rounding noise


class Triplets(NamedTuple):
    """The leading singular triplets of a matrix. For a stack of matrices, all arrays have a leading axis."""

    u: Array  # (out, r)
    s: Array  # (r,), descending
    vt: Array  # (r, in)


class _Bidiagonal(NamedTuple):
    """A matrix, or a stack of them, in the bases so far: G right = left h.

    The next block of `right` is there already: r = new^T G^T Q, where Q is the last block of `left`.
    """

    right: Array  # (in, K)
    left: Array  # (out, K)
    h: Array  # (K, K)
    new: Array  # (in, k)
    r: Array  # (k, k)
    floor: Array  # (), entries below it are noise


def leading_triplets(ops: Ops, gs: Sequence[Gradient], omega: Array, rank: int, limit: int) -> list[Triplets | None]:
    """The `rank` leading singular triplets of each G, as exact as a dense SVD's.

    The matrices go through the iteration together, and each one leaves it when its triplets have converged. That
    depends on the values, so this function cannot be traced.

    Args:
        gs: the matrices, each (out, in), float32 or wider.
        omega: Gaussian, (in, k), k >= rank: the same for all.
        limit: the largest number of directions to try.

    Returns:
        Per matrix, its triplets, where the vectors of a zero singular value may be zero; or None where `limit`
        directions are not enough.
    """
    k = omega.shape[-1]
    v = stacked(ops, [ops.qr(omega)[0]] * len(gs))  # (in, k)
    q, h = ops.qr(_products(ops, times, gs, v))  # (out, k), (k, k)
    floor = NOISE_LEVEL * ops.eps(v) * largest_entry(ops, h)
    q, h = _without_noise(ops, q, h, floor)
    right, left = v, q  # (in, K), (out, K)
    results: list[Triplets | None] = [None] * len(gs)
    active = list(range(len(gs)))  # the index in `results` of each matrix that is still iterated on
    schedule = _CheckSchedule()
    while True:
        last = left.shape[-1] + k > limit
        v, r = _new_block(ops, _products(ops, transposed_times, gs, q), right, floor)  # (in, k), (k, k)
        state = _Bidiagonal(right, left, h, v, r, floor)
        if schedule.due() or last:
            triplets, residual = _triplets(ops, state, rank)
            converged = schedule.converged(residual / (LAPACK_RESIDUAL * ops.eps(v)))
            for i in np.flatnonzero(converged).tolist():
                results[active[i]] = one_of(triplets, i, len(active))
            remaining = np.flatnonzero(~converged).tolist()
            if last or not remaining:
                return results
            if len(remaining) < len(active):
                state = stack_of(ops, [one_of(state, i, len(active)) for i in remaining])
                gs, active = [gs[i] for i in remaining], [active[i] for i in remaining]
        right, left, h, v, r, floor = state
        right = ops.concat([right, v], axis=-1)
        h = ops.matrix_transpose(_append_rows(ops, ops.matrix_transpose(h), r))  # (K, K + k)
        q, r = _new_block(ops, _products(ops, times, gs, v), left, floor)  # (out, k), (k, k)
        left = ops.concat([left, q], axis=-1)
        h = _append_rows(ops, h, r)  # (K, K)


def _products(ops: Ops, product: Callable[[Ops, Gradient, Array], Array], gs: Sequence[Gradient], x: Array) -> Array:
    """The product of each G with its matrix of the stack x. The G are not copied into a stack themselves."""
    if len(gs) == 1:
        return product(ops, gs[0], x)
    return ops.stack([product(ops, g, x[i]) for i, g in enumerate(gs)])


def _triplets(ops: Ops, state: _Bidiagonal, rank: int) -> tuple[Triplets, np.ndarray]:
    """The triplets from the directions so far, and their error per matrix: max_i ||G^T u_i - s_i v_i|| / s_1, (n,)."""
    u, s, vt = ops.svd(state.h)
    residual = _largest_column(ops, ops.matmul(state.r, u[..., -state.r.shape[-1] :, :rank]), s[..., 0])
    u = ops.matmul(state.left, u[..., :rank])
    vt = ops.matmul(vt[..., :rank, :], ops.matrix_transpose(state.right))
    return Triplets(u, s[..., :rank], vt), residual


class _CheckSchedule:
    """When to check for convergence: a check costs an SVD of all directions, more than a few more directions cost."""

    def __init__(self) -> None:
        self._step = 0
        self._next = 1
        self._last_check: tuple[int, np.ndarray] | None = None  # its step, and the residuals that had not converged

    def due(self) -> bool:
        """Count one step, and return whether to check after it."""
        self._step += 1
        return self._step >= self._next

    def converged(self, residuals: np.ndarray) -> np.ndarray:
        """Return which matrices have converged: those whose residual, in units of the allowed one, is at most 1.

        For the others, predict from the last two checks when half of them will have converged, and check again then.
        The prediction assumes that a residual falls by a constant factor per step.
        """
        unconverged = (residuals > 1.0) & (residuals < math.inf)  # a NaN counts as converged; the caller checks for it
        remaining = residuals[unconverged]
        steps_to_go = np.ones(remaining.size)
        if self._last_check is not None:
            step, before = self._last_check
            rate = np.log(before[unconverged] / remaining) / (self._step - step)
            infinite = np.full(remaining.size, math.inf)
            steps_to_go = np.divide(np.log(remaining), rate, out=infinite, where=rate > 0.0)
        if remaining.size:
            # Residuals fall slowly at first, so early predictions are too large: wait at most half of the steps so far.
            self._next = self._step + max(1, int(min(np.median(steps_to_go), self._step / 2)))
        self._last_check = self._step, remaining
        return ~unconverged


def _append_rows(ops: Ops, h: Array, r: Array) -> Array:
    """Append the rows [0 r], (k, q), below h, (p, q)."""
    k = r.shape[-2]
    row = ops.concat([ops.zeros((*h.shape[:-2], k, h.shape[-1] - k), like=h), r], axis=-1)
    return ops.concat([h, row], axis=-2)


def _new_block(ops: Ops, x: Array, basis: Array, floor: Array) -> tuple[Array, Array]:
    """Orthonormal q, (n, k), and r with x = basis (...) + q r. Columns of q are zero where x has nothing new.

    Apart from noise, x overlaps with the last block of the basis only.
    """
    q, r = ops.qr(split_by_projection(ops, x, basis[..., -x.shape[-1] :])[0])
    identity = ops.eye(r.shape[-1], like=r)
    for _ in range(3):
        q, correction = ops.qr(split_by_projection(ops, q, basis)[0])
        r = ops.matmul(correction, r)
        # Twice is enough (Kahan; Parlett 1980), unless the first column was rounding noise, mostly inside the basis.
        if float(ops.to_numpy(ops.max(-abs(diagonal(ops, correction, identity))))) < -0.5:
            break
    return _without_noise(ops, q, r, floor)


def _without_noise(ops: Ops, q: Array, r: Array, floor: Array) -> tuple[Array, Array]:
    """Zero the columns of q, and the rows of r, whose row of r is all noise: such a column points anywhere."""
    keep = ops.astype(ops.max(abs(r), axis=-1) > floor[..., None], r.dtype)  # (k,)
    return q * keep[..., None, :], r * keep[..., :, None]


def _largest_column(ops: Ops, x: Array, unit: Array) -> np.ndarray:
    """The norm of each matrix's largest column, in units of `unit`, (n,); 0 where the unit is 0."""
    columns, units = ops.to_numpy(x).astype(np.float64), ops.to_numpy(unit)[..., None, None]
    columns = np.divide(columns, units, out=np.zeros_like(columns), where=units > 0.0)  # before squares can overflow
    return np.atleast_1d(np.linalg.norm(columns, axis=-2).max(axis=-1))
