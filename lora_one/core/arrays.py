"""Small functions of arrays that the other files share."""

from .ops import Array, Ops


def largest_entry(ops: Ops, x: Array) -> Array:
    """In magnitude, of each matrix: (..., m, n) -> (...)."""
    return ops.max(ops.max(abs(x), axis=-1), axis=-1)


def diagonal(ops: Ops, x: Array, identity: Array) -> Array:
    """Of each matrix: (..., n, n) -> (..., n).

    Args:
        identity: `ops.eye`, (n, n), which who takes a diagonal mostly has.
    """
    return ops.sum(x * identity, axis=-1)


def sum_of_squares(ops: Ops, x: Array, axes: int = 2) -> Array:
    """Over the last one or two axes: of rows first, since one long sum in float32 loses digits."""
    total = x * x
    for _ in range(axes):
        total = ops.sum(total, axis=-1)
    return total


def thin_svd(ops: Ops, x: Array) -> tuple[Array, Array, Array]:
    """Thin SVD through QR, so that a framework only ever decomposes a square of the shorter side."""
    rows, columns = x.shape[-2:]
    if rows < columns:
        u, s, vt = thin_svd(ops, ops.matrix_transpose(x))
        return ops.matrix_transpose(vt), s, ops.matrix_transpose(u)
    if rows == columns:
        return ops.svd(x)
    q, r = ops.qr(x)
    u, s, vt = ops.svd(r)
    return ops.matmul(q, u), s, vt


def vector_norm(ops: Ops, s: Array) -> Array:
    """The 2-norm of s, (p,), without squaring numbers that are too small or too large for it."""
    scale = ops.max(s, axis=-1)
    return scale * ops.sqrt(sum_of_squares(ops, s / nonzero(ops, scale)[..., None], axes=1))


def nonzero(ops: Ops, x: Array) -> Array:
    """x >= 0, with 1 where it is 0: a divisor."""
    return x + ops.astype(x == 0, x.dtype)


def at_least_zero(ops: Ops, x: Array) -> Array:
    return (x + abs(x)) / 2.0


def smaller(ops: Ops, x: Array, y: Array) -> Array:
    return -ops.max(ops.stack([-x, -y]), axis=0)


def split_by_projection(ops: Ops, x: Array, known: Array) -> tuple[Array, Array]:
    """x, (n, k), less its projection on the orthonormal `known`, (n, K), and the coordinates of that, (K, k)."""
    coordinates = ops.matmul(ops.matrix_transpose(known), x)
    return x - ops.matmul(known, coordinates), coordinates
