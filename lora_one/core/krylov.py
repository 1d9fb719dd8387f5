"""The leading singular triplets of a matrix in memory, to rounding error: block Golub-Kahan bidiagonalisation.

Orthonormal blocks V_1, Q_1, V_2, Q_2, ... are found by turns, each from the product of G or G^T with the one before it,
such that

    G [V_1 ... V_j] = [Q_1 ... Q_j] H,  H block bidiagonal
    G^T Q_j = [V_1 ... V_j] (...) + V_{j+1} R

(Golub, Luk and Overton 1981; how fast it converges: Musco and Musco 2015, arXiv 1504.05477). A triplet (u, s, v) of H,
times the blocks, satisfies G v = s u by construction and fails G^T u = s v by V_{j+1} R u_j alone, where u_j is the
part of u that belongs to Q_j. So the next block, which is needed anyway, says how exact the triplets are.
"""

import numpy as np

from .gradient import Gradient, times, transposed_times
from .ops import Array, Ops

LAPACK_RESIDUAL = 16.0  # in units of eps s_1: ||G^T u_i - s_i v_i|| by LAPACK's float32 SVD of a 2048 x 768 gradient
NOTHING_NEW = 4.0  # in units of eps ||G||: what is left of a vector below this length is rounding noise


def leading_triplets(ops: Ops, g: Gradient, omega: Array, rank: int, limit: int) -> tuple[Array, Array, Array] | None:
    """The `rank` leading singular triplets of G, as exact as a dense SVD's.

    When it is done depends on the values: this cannot be traced.

    Args:
        g: (out, in), float32 or wider.
        omega: Gaussian, (in, k), k >= rank.
        limit: directions that may be tried.

    Returns:
        U (out, r), S (r,), V^T (r, in), where a vector of a zero singular value may be zero; or None where `limit`
        directions do not do.
    """
    k = omega.shape[1]
    v, _ = ops.qr(omega)  # (in, k)
    q, h = ops.qr(times(ops, g, v))  # (out, k), (k, k)
    floor = NOTHING_NEW * ops.eps(v) * ops.max(abs(h))
    q, h = _without_noise(ops, q, h, floor)
    right, left = v, q  # (in, K), (out, K)
    while True:
        v, r = _new_block(ops, transposed_times(ops, g, q), right, floor)  # (in, k), (k, k)
        u, s, _ = ops.svd(h)
        settled = _largest(ops, ops.matmul(r, u[-k:, :rank]), s[0]) <= LAPACK_RESIDUAL * ops.eps(v)
        right = ops.concat([right, v], axis=1)
        h = ops.matrix_transpose(_below(ops, ops.matrix_transpose(h), r))  # (K, K + k)
        if settled:
            # That block is in what is returned, whose error is smaller still.
            u, s, vt = ops.svd(h)
            return ops.matmul(left, u[:, :rank]), s[:rank], ops.matmul(vt[:rank, :], ops.matrix_transpose(right))
        if left.shape[1] + k > limit:
            return None
        q, r = _new_block(ops, times(ops, g, v), left, floor)  # (out, k), (k, k)
        left = ops.concat([left, q], axis=1)
        h = _below(ops, h, r)  # (K, K)


def _below(ops: Ops, h: Array, r: Array) -> Array:
    """h, (p, q), with the rows [0 r], (k, q), under it."""
    k = r.shape[0]
    return ops.concat([h, ops.concat([ops.zeros((k, h.shape[1] - k), like=h), r], axis=1)], axis=0)


def _new_block(ops: Ops, x: Array, known: Array, floor: Array) -> tuple[Array, Array]:
    """Orthonormal q, (n, k), and r with x = known (...) + q r; columns of q are zero where x has nothing new."""
    q, r = ops.qr(minus_projection(ops, x, known))
    identity = ops.eye(r.shape[0], like=r)
    for _ in range(3):
        q, again = ops.qr(minus_projection(ops, q, known))
        r = ops.matmul(again, r)
        # Twice is enough (Kahan; Parlett 1980), unless a first column was itself rounding noise, mostly inside `known`.
        if float(ops.to_numpy(ops.max(-abs(ops.sum(again * identity, axis=0))))) < -0.5:
            break
    return _without_noise(ops, q, r, floor)


def minus_projection(ops: Ops, x: Array, known: Array) -> Array:
    """x, (n, k), less its projection on the orthonormal `known`, (n, K)."""
    return x - ops.matmul(known, ops.matmul(ops.matrix_transpose(known), x))


def _without_noise(ops: Ops, q: Array, r: Array, floor: Array) -> tuple[Array, Array]:
    """Zero columns of q, and rows of r, where the row of r is all noise: q there would be an arbitrary direction."""
    keep = ops.astype(ops.max(abs(r), axis=1) > floor, r.dtype)  # (k,)
    return q * keep, r * keep[:, None]


def _largest(ops: Ops, x: Array, unit: Array) -> float:
    """The largest column's norm over `unit`; 0 where that is 0."""
    columns, one = ops.to_numpy(x).astype(np.float64), float(ops.to_numpy(unit))
    return 0.0 if one == 0.0 else float(np.linalg.norm(columns / one, axis=0).max())
