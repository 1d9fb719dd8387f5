"""The gradient G of a weight, (out, in): a matrix, or the product that a backward pass has of it."""

from typing import NamedTuple

from .arrays import sum_of_squares
from .ops import Array, Ops

UNIT_OF_ZERO = 1e-30  # a unit where all entries are zero
ENTRIES_AT_ONCE = 2**21  # of G, in a copy, which must not fill the memory


class RowProduct(NamedTuple):
    """G = dy^T x, a sum over T tokens, not multiplied out."""

    dy: Array  # (T, out), dL/dy
    x: Array  # (T, in)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.dy.shape[1], self.x.shape[1]

    @property
    def is_smaller(self) -> bool:
        """See `rows_are_smaller`."""
        return rows_are_smaller(self.dy.shape[0], *self.shape)


def rows_are_smaller(tokens: int, out_features: int, in_features: int) -> bool:
    """Whether dy and x have fewer entries than G: then a product with G also costs less by way of them."""
    return tokens * (out_features + in_features) < out_features * in_features


Gradient = Array | RowProduct


def arrays_of(g: Gradient) -> tuple[Array, ...]:
    """The arrays that hold G."""
    return tuple(g) if isinstance(g, RowProduct) else (g,)


def as_matrix(ops: Ops, g: Gradient) -> Array:
    """G, (out, in)."""
    return ops.matmul(ops.matrix_transpose(g.dy), g.x) if isinstance(g, RowProduct) else g


def times(ops: Ops, g: Gradient, v: Array) -> Array:
    """G v, (out, k)."""
    if isinstance(g, RowProduct):
        return ops.matmul(ops.matrix_transpose(g.dy), ops.matmul(g.x, v))
    return ops.matmul(g, v)


def transposed_times(ops: Ops, g: Gradient, q: Array) -> Array:
    """G^T q, (in, k)."""
    if isinstance(g, RowProduct):
        return ops.matmul(ops.matrix_transpose(g.x), ops.matmul(g.dy, q))
    return ops.matmul(ops.matrix_transpose(g), q)


def frobenius_norm(ops: Ops, g: Array, scale: Array) -> Array:
    """||G||_F, (), by way of numbers in units of `scale`, (), whose squares must not overflow."""
    rows = max(1, ENTRIES_AT_ONCE // g.shape[1])
    total = ops.zeros((), like=g)
    for i in range(0, g.shape[0], rows):
        total = total + sum_of_squares(ops, g[i : i + rows] / scale)
    return scale * ops.sqrt(total)


def norm_of_rows(ops: Ops, g: RowProduct) -> tuple[Array, Array]:
    """||G||_F, (), and how little of it cancels: ||G||_F^2 over the sum of the magnitudes that it is summed from.

    ||dy^T x||_F^2 is the sum of the entries of dy dy^T times those of x x^T. Where what the rows have in common
    cancels, rounding is as large as what is left: the share says whether to believe it.
    """
    # Units: neither factor need be of the size of their product.
    of_dy, of_x = (ops.max(abs(y)) + UNIT_OF_ZERO for y in g)
    dy, x = g.dy / of_dy, g.x / of_x
    terms = ops.matmul(dy, ops.matrix_transpose(dy)) * ops.matmul(x, ops.matrix_transpose(x))  # (T, T)
    total, magnitudes = (ops.sum(ops.sum(part, axis=1)) for part in (terms, abs(terms)))
    total = (total + abs(total)) / 2.0  # rounding may leave less than nothing
    return of_dy * of_x * ops.sqrt(total), total / (magnitudes + UNIT_OF_ZERO)
