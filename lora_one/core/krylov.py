"""The leading singular triplets of a large matrix in memory: block Golub-Kahan bidiagonalisation.

Orthonormal blocks V_1, Q_1, V_2, Q_2, ... are computed alternately, each from the product of G or G^T with the block
before it, such that

    [Q_1 ... Q_j]^T G = H [V_1 ... V_{j+1}]^T,  H block bidiagonal, (j k, j k + k)

(Golub, Luk and Overton 1981; how fast it converges: Musco and Musco 2015, arXiv 1504.05477). The triplets of H are
those of G, but for what is outside the span of the Q. How much energy they lack shows in their share of V_{j+1}, the
newest directions: see `core.estimates.energy_by_turning`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .arrays import diagonal, largest_entry, nonzero, split_by_projection, sum_of_squares
from .estimates import energy_by_turning
from .gradient import Gradient, times, transposed_times
from .ops import Array, Ops
from .stacking import one_of, stack_of, stacked

CHECKS = (4, 8, 16)  # blocks of Q after which the triplets are looked at, two products each; the last check ends
NOISE_LEVEL = 4.0  # in units of eps ||G||: a vector shorter than this consists of rounding noise


class Triplets(NamedTuple):
    """The leading singular triplets of a matrix. For a stack of matrices, all arrays have a leading axis."""

    u: Array  # (out, r)
    s: Array  # (r,), descending
    vt: Array  # (r, in)
    best_norm: Array  # (), estimate of ||G_r||_F of the best rank-r part; rather too large


class _Bidiagonal(NamedTuple):
    """A matrix, or a stack of them, in the bases so far: left^T G = h right^T."""

    right: Array  # (in, K + k)
    left: Array  # (out, K)
    h: Array  # (K, K + k)
    floor: Array  # (), entries below it are noise


def leading_triplets(ops: Ops, gs: Sequence[Gradient], omega: Array, rank: int, may_miss: float) -> list[Triplets]:
    """The `rank` leading singular triplets of each G, as soon as they miss little, or after the last of `CHECKS`.

    The matrices go through the iteration together, and each one leaves it at the check that finds its triplets good.
    That depends on the values, so this function cannot be traced.

    Args:
        gs: the matrices, each (out, in), float32 or wider, of at least `CHECKS[-1]` k rows and columns.
        omega: Gaussian, (in, k), k >= rank: the same for all.
        may_miss: share of the energy of the best rank-r part.

    Returns:
        Per matrix, its triplets. The vectors of a zero singular value may be zero.
    """
    k = omega.shape[-1]
    right = stacked(ops, [ops.qr(omega)[0]] * len(gs))  # (in, k)
    left, h = ops.qr(_products(ops, times, gs, right))  # (out, k), (k, k)
    floor = NOISE_LEVEL * ops.eps(right) * largest_entry(ops, h)
    left, h = _without_noise(ops, left, h, floor)
    found: dict[int, Triplets] = {}
    active = list(range(len(gs)))  # the index in `found` of each matrix that is still iterated on
    while True:
        product = _products(ops, transposed_times, gs, left[..., -k:])
        v, r = _new_block(ops, product, right, floor)  # (in, k), (k, k)
        right = ops.concat([right, v], axis=-1)
        h = ops.matrix_transpose(_append_rows(ops, ops.matrix_transpose(h), r))  # (K, K + k)
        blocks = left.shape[-1] // k
        if blocks in CHECKS:
            state = _Bidiagonal(right, left, h, floor)
            triplets, missed = _triplets(ops, state, rank, k)
            lacking = (missed > may_miss) & (blocks < CHECKS[-1])  # a NaN lacks nothing: the caller checks for it
            remaining = np.flatnonzero(lacking).tolist()
            for i in np.flatnonzero(~lacking).tolist():
                found[active[i]] = one_of(triplets, i, len(active))
            if not remaining:
                return [found[i] for i in sorted(found)]
            if len(remaining) < len(active):
                state = stack_of(ops, [one_of(state, i, len(active)) for i in remaining])
                gs, active = [gs[i] for i in remaining], [active[i] for i in remaining]
            right, left, h, floor = state
        q, r = _new_block(ops, _products(ops, times, gs, right[..., -k:]), left, floor)  # (out, k), (k, k)
        left = ops.concat([left, q], axis=-1)
        h = _append_rows(ops, h, r)  # (K, K)


def _products(ops: Ops, product: Callable[[Ops, Gradient, Array], Array], gs: Sequence[Gradient], x: Array) -> Array:
    """The product of each G with its matrix of the stack x. The G are not copied into a stack themselves."""
    if len(gs) == 1:
        return product(ops, gs[0], x)
    return ops.stack([product(ops, g, x[i]) for i, g in enumerate(gs)])


def _triplets(ops: Ops, state: _Bidiagonal, rank: int, k: int) -> tuple[Triplets, np.ndarray]:
    """The triplets from the directions so far, and per matrix the share of the best energy that they miss, (n,)."""
    u, s, vt = ops.svd(state.h)  # (K, K), (K,), (K, K + k)
    newest = vt[..., :rank, -k:]  # (r, k)
    unit = nonzero(ops, s[..., 0])
    values = s[..., :k] / unit[..., None]  # squares must neither overflow nor underflow
    held = sum_of_squares(ops, values[..., :rank], axes=1)
    to_come = energy_by_turning(ops, values, sum_of_squares(ops, newest, axes=1), rank)
    best = held + to_come
    u = ops.matmul(state.left, u[..., :rank])
    vt = ops.matmul(vt[..., :rank, :], ops.matrix_transpose(state.right))
    missed = np.atleast_1d(ops.to_numpy(to_come / nonzero(ops, best)))
    return Triplets(u, s[..., :rank], vt, unit * ops.sqrt(best)), missed


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
