"""Small functions of arrays that the other files share."""

from .ops import Array, Ops


def largest_entry(ops: Ops, x: Array) -> Array:
    """The largest magnitude in each matrix: (..., m, n) -> (...)."""
    return ops.max(ops.max(abs(x), axis=-1), axis=-1)


def diagonal(ops: Ops, x: Array, identity: Array) -> Array:
    """The diagonal of each matrix: (..., n, n) -> (..., n).

    Args:
        identity: `ops.eye(n)`, (n, n). Callers that need a diagonal mostly have it already.
    """
    return ops.sum(x * identity, axis=-1)


def sum_of_squares(ops: Ops, x: Array, axes: int = 2) -> Array:
    """Sum x^2 over the last one or two axes. Rows go first: one long sum in float32 loses digits."""
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
    """The 2-norm of s >= 0, (..., p) -> (...), without squares that overflow or underflow."""
    scale = ops.max(s, axis=-1)
    return scale * ops.sqrt(sum_of_squares(ops, s / nonzero(ops, scale)[..., None], axes=1))


def nonzero(ops: Ops, x: Array) -> Array:
    """Replace 0 by 1 in x >= 0, so that one can divide by the result."""
    return x + ops.astype(x == 0, x.dtype)


def at_least(ops: Ops, x: Array, floor: float) -> Array:
    """The larger of x and a number, entry by entry."""
    above = x - floor
    return floor + (above + abs(above)) / 2.0


def smaller(ops: Ops, x: Array, y: Array) -> Array:
    """The smaller of x and y, entry by entry."""
    return -ops.max(ops.stack([-x, -y]), axis=0)


def mean_of_samples(ops: Ops, samples: Array) -> tuple[Array, Array]:
    """The mean of independent samples, (..., p) -> (...), and the variance of that mean."""
    p = samples.shape[-1]
    mean = ops.sum(samples, axis=-1) / p
    return mean, sum_of_squares(ops, samples - mean[..., None], axes=1) / (p * max(p - 1, 1))


def split_by_projection(ops: Ops, x: Array, basis: Array) -> tuple[Array, Array]:
    """Split x, (n, k), by an orthonormal basis Q, (n, K): x - Q Q^T x, (n, k), and the coordinates Q^T x, (K, k)."""
    coordinates = ops.matmul(ops.matrix_transpose(basis), x)
    return x - ops.matmul(basis, coordinates), coordinates
