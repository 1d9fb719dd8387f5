"""The gradient G of a weight, (out, in): a matrix, or the product that a backward pass has of it."""

from typing import NamedTuple

from .ops import Array, Ops

TINY = 1e-30  # a unit where all entries are zero


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
        """Whether both factors have fewer entries than G: then a product with G also costs less by way of them."""
        return self.dy.shape[0] * sum(self.shape) < self.shape[0] * self.shape[1]


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


def frobenius_norm(ops: Ops, g: Gradient, scale: Array) -> Array:
    """||G||_F, (), by way of numbers in units of `scale`, whose squares must not overflow."""
    if isinstance(g, RowProduct):
        # ||dy^T x||^2 = <dy dy^T, x x^T>, each factor in units of its own: neither need be of the size of the product.
        of_dy, of_x = (ops.max(abs(y)) + TINY for y in g)
        dy, x = g.dy / of_dy, g.x / of_x
        grams = ops.matmul(dy, ops.matrix_transpose(dy)) * ops.matmul(x, ops.matrix_transpose(x))  # (T, T)
        total = ops.sum(ops.sum(grams, axis=1))
        return of_dy * of_x * ops.sqrt((total + abs(total)) / 2.0)  # rounding may leave less than zero of it
    rows = 512  # some at a time: a copy of G must not fill the memory
    total = ops.zeros((), like=g)
    for i in range(0, g.shape[0], rows):
        part = g[i : i + rows] / scale
        total = total + ops.sum(ops.sum(part * part, axis=1))  # of rows first: one long sum in float32 loses digits
    return scale * ops.sqrt(total)
