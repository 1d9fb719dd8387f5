"""Orthonormal bases that grow block by block, as tuples of blocks (rows, d)."""

from .arrays import split_by_projection
from .ops import Array, Ops, as_one_program

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

    Columns are zero where the space is exhausted.

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
            q, _ = ops.qr(project_out(ops, q, basis)[0])
    return q if d == k else ops.concat([q, ops.zeros((*remainder.shape[:-1], k - d), like=remainder)], axis=-1)
