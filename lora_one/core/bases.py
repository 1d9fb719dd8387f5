"""Orthonormal bases that grow block by block, as tuples of blocks (rows, d), and the bases of a block Krylov space.

Products with G and with G^T alternate. Each yields a block of new directions, and the coordinates of G in the bases so
far: block Golub-Kahan bidiagonalisation with full reorthogonalisation.
"""

from typing import NamedTuple

from .arrays import diagonal, split_by_projection
from .ops import Array, Ops, as_one_program

LEAST_LEFT = 0.9  # of a unit vector, by its last projection: what loses more was noise inside of the basis
REORTHOGONALIZE_THRESHOLD = 4  # project a third time where the basis spans more than 1 / 4 of the space


def columns(basis: tuple[Array, ...]) -> int:
    """The number of directions in a basis."""
    return sum(block.shape[-1] for block in basis)


def fit_block(block: Array, basis: tuple[Array, ...]) -> Array:
    """Cut a new block, (rows, k), to the columns that the space has room for beside the basis: (rows, d)."""
    return block[..., : min(block.shape[-1], block.shape[-2] - columns(basis))]


def project_out(ops: Ops, x: Array, basis: tuple[Array, ...]) -> tuple[Array, list[Array]]:
    """Subtract from x its projections on the blocks of a basis, one after the other.

    Returns:
        The remainder, and per block q the coordinates q^T x, where x has lost its projections on the earlier blocks.
    """
    split = as_one_program(ops, split_by_projection)
    coordinates = []
    for q in basis:
        x, in_block = split(x, q)
        coordinates.append(in_block)
    return x, coordinates


def new_directions(ops: Ops, remainder: Array, basis: tuple[Array, ...], k: int) -> Array:
    """An orthonormal basis of the directions that a remainder adds to a basis, (rows, k).

    Columns are zero where the space is exhausted, or that part of it in which all of G lies.

    Args:
        remainder: what `project_out` left, (rows, d).
    """
    rows = remainder.shape[-2]
    d = min(remainder.shape[-1], rows - columns(basis))
    if d == 0:
        return ops.zeros((*remainder.shape[:-1], k), like=remainder)
    q, _ = ops.qr(remainder[..., :d])
    if basis:
        # Twice is enough (Kahan; Parlett 1980), with one exception: the remainder is rounding noise, and the basis
        # spans much of the space. Then little of the noise is outside the basis, and a third projection is needed.
        crowded = REORTHOGONALIZE_THRESHOLD * (columns(basis) + d) > rows
        for _ in range(2 if crowded else 1):
            q, r = ops.qr(project_out(ops, q, basis)[0])
        # Where G has rows of zeros, noise may have no room outside the basis, however often it is projected.
        left = abs(diagonal(ops, r, ops.eye(d, like=r)))  # (d,), of each column's length
        q = q * ops.astype(left > LEAST_LEFT, q.dtype)[..., None, :]
    return q if d == k else ops.concat([q, ops.zeros((*remainder.shape[:-1], k - d), like=remainder)], axis=-1)


def grow(ops: Ops, basis: tuple[Array, ...], x: Array, k: int) -> tuple[Array, Array]:
    """Find what x, (rows, d), adds to a basis.

    Returns:
        The new block, (rows, k), with zero columns where the space is exhausted; and the coordinates of x in the basis
        and in the part of the block that fits.
    """
    remainder, coordinates = project_out(ops, x, basis)  # (rows, d), each (., d)
    block = new_directions(ops, remainder, basis, k)
    coordinates.append(ops.matmul(ops.matrix_transpose(fit_block(block, basis)), x))
    return block, ops.concat(coordinates, axis=-2)


class KrylovBases(NamedTuple):
    """Two orthonormal bases, and the coordinates of G in them.

    The blocks of each basis are (., d), d <= k, and orthonormal together. The product with G lies in the span of the
    blocks known by then and of the block that it adds, so only its coordinates are kept. The shapes below are for one
    layer; for a stack of layers, all arrays have a leading axis.
    """

    next_probe: Array  # (in, k) before odd products, (out, k) before even ones
    right: tuple[Array, ...] = ()  # blocks V_j, (in, d)
    left: tuple[Array, ...] = ()  # blocks Q_j, (out, d)
    # Of product 1, 3, ...: [Q_1 ... Q_j]^T G V_j, (j k, d); of product 2, 4, ...: [V_1 ... V_{j+1}]^T G^T Q_j,
    # (j k + k, d).
    coordinates: tuple[Array, ...] = ()

    @property
    def products(self) -> int:
        """The number of products that the bases were made from."""
        return len(self.coordinates)


def extend(ops: Ops, bases: KrylovBases, product: Array) -> KrylovBases:
    """Return the bases after one product more.

    Args:
        product: of G with `next_probe`, (out, k), before odd products; of G^T with it, (in, k), before even ones.
    """
    k = bases.next_probe.shape[-1]
    if bases.products % 2 == 0:
        probed = fit_block(bases.next_probe, bases.right)
        basis = bases.left
        bases = bases._replace(right=(*bases.right, probed))
    else:
        probed = fit_block(bases.next_probe, bases.left)
        basis = bases.right
        bases = bases._replace(left=(*bases.left, probed))
    block, coordinates = grow(ops, basis, product[..., : probed.shape[-1]], k)
    return bases._replace(next_probe=block, coordinates=(*bases.coordinates, coordinates))


def completed(bases: KrylovBases) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The left and the right basis after an even number of products, with the block that the last one added.

    The rows of the left basis know all of G in the right one.
    """
    return bases.left, (*bases.right, fit_block(bases.next_probe, bases.right))


def projected(ops: Ops, bases: KrylovBases) -> Array:
    """G in the completed bases, (K, K'): rows of the left basis, columns of the right one."""
    # Product 2, 4, ... is of G^T with a left block, and knows only the right blocks up to its own: zeros fill up.
    of_left = bases.coordinates[1::2]
    filled = [_with_rows(ops, x, of_left[-1].shape[-2]) for x in of_left]  # each (K', d)
    return ops.matrix_transpose(ops.concat(filled, axis=-1))


def _with_rows(ops: Ops, x: Array, rows: int) -> Array:
    """Append zero rows to x until it has the given number of rows."""
    missing = rows - x.shape[-2]
    return ops.concat([x, ops.zeros((*x.shape[:-2], missing, x.shape[-1]), like=x)], axis=-2) if missing else x
