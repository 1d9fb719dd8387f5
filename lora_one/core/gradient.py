"""The gradient G of a weight, (out, in): a matrix, or two factors of it that a backward pass has anyway."""

from typing import NamedTuple

from .arrays import sum_of_squares
from .ops import Array, Ops

UNIT_OF_ZERO = 1e-30  # the unit of measure where all entries are zero
ENTRIES_AT_ONCE = 2**21  # entries of G per copy, so that a copy does not fill the memory


class RowProduct(NamedTuple):
    """G = dy^T x, a sum over T tokens, kept as its two factors. For a stack of layers, with a leading axis."""

    dy: Array  # (T, out), dL/dy
    x: Array  # (T, in)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of G, (out, in)."""
        return self.dy.shape[-1], self.x.shape[-1]

    @property
    def is_smaller(self) -> bool:
        """See `rows_are_smaller`."""
        return rows_are_smaller(self.dy.shape[-2], *self.shape)


def rows_are_smaller(tokens: int, out_features: int, in_features: int) -> bool:
    """Return whether dy and x have fewer entries than G. If so, a product with G is also cheaper through them."""
    return tokens * (out_features + in_features) < out_features * in_features


Gradient = Array | RowProduct


def arrays_of(g: Gradient) -> tuple[Array, ...]:
    """Return the arrays that G is stored in."""
    return tuple(g) if isinstance(g, RowProduct) else (g,)


def as_matrix(ops: Ops, g: Gradient) -> Array:
    """G as one matrix, (out, in)."""
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
    """Return ||G||_F, (), computed in units of `scale`, (), so that squares do not overflow."""
    rows = max(1, ENTRIES_AT_ONCE // g.shape[1])
    total = ops.zeros((), like=g)
    for i in range(0, g.shape[0], rows):
        total = total + sum_of_squares(ops, g[i : i + rows] / scale)
    return scale * ops.sqrt(total)


def norm_of_rows(ops: Ops, g: RowProduct) -> tuple[Array, Array]:
    """Return ||G||_F, (), from the factors, and the share of it that does not cancel, ().

    ||dy^T x||_F^2 is the sum of the entries of dy dy^T times those of x x^T. The share is this sum over the sum of the
    terms' magnitudes. Where it is tiny, the terms cancel and rounding is as large as the result: do not trust the norm.
    """
    # Each factor has its own unit: only their product need be of ordinary size.
    unit_dy, unit_x = (ops.max(abs(y)) + UNIT_OF_ZERO for y in g)
    dy, x = g.dy / unit_dy, g.x / unit_x
    terms = ops.matmul(dy, ops.matrix_transpose(dy)) * ops.matmul(x, ops.matrix_transpose(x))  # (T, T)
    total, magnitudes = (ops.sum(ops.sum(part, axis=1)) for part in (terms, abs(terms)))
    total = (total + abs(total)) / 2.0  # rounding may make it negative
    return unit_dy * unit_x * ops.sqrt(total), total / (magnitudes + UNIT_OF_ZERO)
