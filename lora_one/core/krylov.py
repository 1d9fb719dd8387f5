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
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .arrays import diagonal, largest_entry, split_by_projection
from .gradient import Gradient, times, transposed_times
from .ops import Array, Ops
from .stacking import one_of, stack_of, stacked

LAPACK_RESIDUAL = 16.0  # in units of eps s_1: ||G^T u_i - s_i v_i|| by LAPACK's float32 SVD of a 2048 x 768 gradient
NOISE_LEVEL = 4.0  # in units of eps ||G||: what is left of a vector below this length is rounding noise


class Triplets(NamedTuple):
    """The leading singular triplets of a matrix; of a stack of matrices all have a leading axis."""

    u: Array  # (out, r)
    s: Array  # (r,), descending
    vt: Array  # (r, in)


class _Known(NamedTuple):
    """Of a matrix, or of a stack of them: G right = left h, and the next block of `right`, r = new^T G^T left[-1]."""

    right: Array  # (in, K)
    left: Array  # (out, K)
    h: Array  # (K, K)
    new: Array  # (in, k)
    r: Array  # (k, k)
    floor: Array  # (), entries below it are noise


def leading_triplets(ops: Ops, gs: Sequence[Gradient], omega: Array, rank: int, limit: int) -> list[Triplets | None]:
    """The `rank` leading singular triplets of each G, as exact as a dense SVD's.

    When it is done depends on the values: this cannot be traced. Several matrices go together, and each stops where it
    is done.

    Args:
        gs: each (out, in), float32 or wider.
        omega: Gaussian, (in, k), k >= rank: the same for all.
        limit: directions that may be tried.

    Returns:
        of each G its triplets, where a vector of a zero singular value may be zero; or None where `limit` directions
        do not do.
    """
    k = omega.shape[-1]
    v = stacked(ops, [ops.qr(omega)[0]] * len(gs))  # (in, k)
    q, h = ops.qr(_of_each(ops, times, gs, v))  # (out, k), (k, k)
    floor = NOISE_LEVEL * ops.eps(v) * largest_entry(ops, h)
    q, h = _without_noise(ops, q, h, floor)
    right, left = v, q  # (in, K), (out, K)
    found: list[Triplets | None] = [None] * len(gs)
    going = list(range(len(gs)))
    checks = _Checks()
    while True:
        last = left.shape[-1] + k > limit
        v, r = _new_block(ops, _of_each(ops, transposed_times, gs, q), right, floor)  # (in, k), (k, k)
        known = _Known(right, left, h, v, r, floor)
        if checks.due() or last:
            triplets, residual = _triplets(ops, known, rank)
            passed = checks.passed(residual / (LAPACK_RESIDUAL * ops.eps(v)))
            for i in np.flatnonzero(passed).tolist():
                found[going[i]] = one_of(triplets, i, len(going))
            rest = np.flatnonzero(~passed).tolist()
            if last or not rest:
                return found
            if len(rest) < len(going):
                known = stack_of(ops, [one_of(known, i, len(going)) for i in rest])
                gs, going = [gs[i] for i in rest], [going[i] for i in rest]
        right, left, h, v, r, floor = known
        right = ops.concat([right, v], axis=-1)
        h = ops.matrix_transpose(_below(ops, ops.matrix_transpose(h), r))  # (K, K + k)
        q, r = _new_block(ops, _of_each(ops, times, gs, v), left, floor)  # (out, k), (k, k)
        left = ops.concat([left, q], axis=-1)
        h = _below(ops, h, r)  # (K, K)


def _of_each(ops: Ops, product: Callable[[Ops, Gradient, Array], Array], gs: Sequence[Gradient], x: Array) -> Array:
    """Of each G, which are not copied into a stack, with its matrix of the stack x; of a single one with x itself."""
    if len(gs) == 1:
        return product(ops, gs[0], x)
    return ops.stack([product(ops, g, x[i]) for i, g in enumerate(gs)])


def _triplets(ops: Ops, known: _Known, rank: int) -> tuple[Triplets, np.ndarray]:
    """As they are known so far, and how far each matrix's are from it: max_i ||G^T u_i - s_i v_i|| / s_1, (n,)."""
    u, s, vt = ops.svd(known.h)
    residual = _largest(ops, ops.matmul(known.r, u[..., -known.r.shape[-1] :, :rank]), s[..., 0])
    u = ops.matmul(known.left, u[..., :rank])
    vt = ops.matmul(vt[..., :rank, :], ops.matrix_transpose(known.right))
    return Triplets(u, s[..., :rank], vt), residual


class _Checks:
    """When to look whether triplets are exact: an SVD of all directions so far costs more than a few more of them."""

    def __init__(self) -> None:
        self._step = 0
        self._next = 1
        self._before: tuple[int, np.ndarray] | None = None  # the last look, and what it saw of those that go on

    def due(self) -> bool:
        """Count a step, and say whether to look after it."""
        self._step += 1
        return self._step >= self._next

    def passed(self, residuals: np.ndarray) -> np.ndarray:
        """Which of some matrices' residuals, in units of what is allowed, are.

        The others go on, and when half of them will be is foretold: a residual falls by a factor a step.
        """
        goes_on = (residuals > 1.0) & (residuals < math.inf)  # what is no number will be seen by whoever asked
        rest = residuals[goes_on]
        to_go = np.ones(rest.size)
        if self._before is not None:
            step, before = self._before
            a_step = np.log(before[goes_on] / rest) / (self._step - step)
            to_go = np.divide(np.log(rest), a_step, out=np.full(rest.size, math.inf), where=a_step > 0.0)
        if rest.size:
            # Early on it falls slowly, and foretells too much: no more than half of the steps that were made.
            self._next = self._step + max(1, int(min(np.median(to_go), self._step / 2)))
        self._before = self._step, rest
        return ~goes_on


def _below(ops: Ops, h: Array, r: Array) -> Array:
    """h, (p, q), with the rows [0 r], (k, q), under it."""
    k = r.shape[-2]
    row = ops.concat([ops.zeros((*h.shape[:-2], k, h.shape[-1] - k), like=h), r], axis=-1)
    return ops.concat([h, row], axis=-2)


def _new_block(ops: Ops, x: Array, known: Array, floor: Array) -> tuple[Array, Array]:
    """Orthonormal q, (n, k), and r with x = known (...) + q r; columns of q are zero where x has nothing new.

    Of the known blocks x has the last alone, and noise.
    """
    q, r = ops.qr(split_by_projection(ops, x, known[..., -x.shape[-1] :])[0])
    identity = ops.eye(r.shape[-1], like=r)
    for _ in range(3):
        q, again = ops.qr(split_by_projection(ops, q, known)[0])
        r = ops.matmul(again, r)
        # Twice is enough (Kahan; Parlett 1980), unless a first column was itself rounding noise, mostly inside `known`.
        if float(ops.to_numpy(ops.max(-abs(diagonal(ops, again, identity))))) < -0.5:
            break
    return _without_noise(ops, q, r, floor)


def _without_noise(ops: Ops, q: Array, r: Array, floor: Array) -> tuple[Array, Array]:
    """Zero columns of q, and rows of r, where the row of r is all noise: q there would be an arbitrary direction."""
    keep = ops.astype(ops.max(abs(r), axis=-1) > floor[..., None], r.dtype)  # (k,)
    return q * keep[..., None, :], r * keep[..., :, None]


def _largest(ops: Ops, x: Array, unit: Array) -> np.ndarray:
    """The largest column's norm over `unit`, of each matrix, (n,); 0 where that is 0."""
    columns, one = ops.to_numpy(x).astype(np.float64), ops.to_numpy(unit)[..., None, None]
    columns = np.divide(columns, one, out=np.zeros_like(columns), where=one > 0.0)  # before squares can overflow
    return np.atleast_1d(np.linalg.norm(columns, axis=-2).max(axis=-1))
