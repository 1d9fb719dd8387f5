"""A truncated SVD, U diag(S) V^T of rank k, and what is added to it. For a stack of layers, with a leading axis."""

from typing import NamedTuple

from .arrays import diagonal, split_by_projection, thin_svd
from .bases import fit_block, grow
from .ops import Array, Ops
from .sides import Products


class Triplets(NamedTuple):
    """The k singular triplets that are known of a matrix, (out, in)."""

    u: Array  # (out, k), orthonormal columns
    s: Array  # (k,), descending
    v: Array  # (in, k), orthonormal columns


def add_both_sides(ops: Ops, known: Triplets, products: Products) -> Triplets:
    """Add the part of a matrix G, (out, in), that its products with both sides give: all but the block outside U and V.

    Args:
        products: with right = V and left = U.
    """
    left, u_gv = _grown(ops, known.u, products.g_right)  # u_gv: [U Q]^T G V, (k + d, k)
    right, v_gu = _grown(ops, known.v, products.g_left)  # v_gu: [V P]^T G^T U, (k + d', k)
    k = known.s.shape[-1]
    upper = ops.matrix_transpose(v_gu)  # U^T G [V P], (k, k + d')
    unknown = ops.zeros((*known.s.shape[:-1], u_gv.shape[-2] - k, v_gu.shape[-2] - k), like=u_gv)
    lower = ops.concat([u_gv[..., k:, :], unknown], axis=-1)  # (d, k + d')
    return truncated(ops, left, _plus_diagonal(ops, ops.concat([upper, lower], axis=-2), known.s), right)


def sum_of(ops: Ops, one: Triplets, other: Triplets) -> Triplets:
    """Return the best rank-k part of the sum of two."""
    left, in_left = _grown(ops, one.u, other.u)  # (k + d, k)
    right, in_right = _grown(ops, one.v, other.v)
    core = ops.matmul(in_left * other.s[..., None, :], ops.matrix_transpose(in_right))  # (k + d, k + d')
    return truncated(ops, left, _plus_diagonal(ops, core, one.s), right)


def truncated(ops: Ops, left: tuple[Array, ...], core: Array, right: tuple[Array, ...]) -> Triplets:
    """Return the best rank-k part of left core right^T: blocks (out, d) and (in, d), core (K, K'), K and K' >= k.

    k is the width of the first blocks.
    """
    k = right[0].shape[-1]
    u, s, vt = thin_svd(ops, core)
    return Triplets(
        orthonormal(ops, ops.matmul(ops.concat(left, axis=-1), u[..., :k])),
        s[..., :k],
        orthonormal(ops, ops.matmul(ops.concat(right, axis=-1), ops.matrix_transpose(vt[..., :k, :]))),
    )


def outside(ops: Ops, x: Array, basis: Array) -> Array:
    """The squared distance of each column of x, (rows, k), from the span of a basis, (rows, k): (k,)."""
    remainder, _ = split_by_projection(ops, x, basis)
    return ops.sum(remainder * remainder, axis=-2)


def orthonormal(ops: Ops, x: Array) -> Array:
    """Return x, (rows, k), with its last columns made orthonormal to the others, where they are not.

    The bases have zero columns where the space is exhausted, and the vectors of singular values that are zero may mix
    them with the others. If such vectors were probed next, the SVD would count energy twice.
    """
    q, r = ops.qr(x)
    positive = ops.astype(diagonal(ops, r, ops.eye(x.shape[-1], like=r)) >= 0, r.dtype)  # (k,), 1 or 0
    return q * (2.0 * positive - 1.0)[..., None, :]


def _grown(ops: Ops, basis: Array, x: Array) -> tuple[tuple[Array, ...], Array]:
    """A basis, (rows, k), with the directions that x, (rows, k), adds; and the coordinates of x in both, (k + d, k)."""
    block, coordinates = grow(ops, (basis,), x, x.shape[-1])
    return (basis, fit_block(block, (basis,))), coordinates


def _plus_diagonal(ops: Ops, core: Array, s: Array) -> Array:
    """Add diag(s), (k, k), to the upper left of core, (K, K')."""
    k, (rows, columns) = s.shape[-1], core.shape[-2:]
    diagonal_block = ops.eye(k, like=s) * s[..., None, :]
    zero = ops.zeros((*s.shape[:-1], k, columns - k), like=s)
    below = ops.zeros((*s.shape[:-1], rows - k, columns), like=s)
    return core + ops.concat([ops.concat([diagonal_block, zero], axis=-1), below], axis=-2)
