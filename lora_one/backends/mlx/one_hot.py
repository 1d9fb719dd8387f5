"""The rows x of an embedding: one-hot, (T, tokens), of which only the places of the ones are kept."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from lora_one.core.gradient import RowProduct


class OneHot:
    """A matrix whose row t has a one at `index[t]`, (T, columns), or its transpose, for products with other matrices.

    It has what `core.gradient` and MLX's operations ask of rows.
    """

    ndim = 2

    def __init__(self, index: mx.array, columns: int, dtype: mx.Dtype, is_transposed: bool = False):
        self.index, self.columns, self.dtype = index, columns, dtype
        self.is_transposed = is_transposed

    @property
    def shape(self) -> tuple[int, int]:
        rows = self.index.shape[0]
        return (self.columns, rows) if self.is_transposed else (rows, self.columns)

    def __len__(self) -> int:
        return self.shape[0]

    def swapaxes(self, *_: int) -> "OneHot":
        return OneHot(self.index, self.columns, self.dtype, not self.is_transposed)

    def times(self, x: mx.array) -> mx.array:
        """Return the product with a matrix on the right: its rows looked up, or summed where they go."""
        if not self.is_transposed:
            return x[self.index]
        return mx.zeros((self.columns, x.shape[1]), dtype=x.dtype).at[self.index].add(x)


def product(a: Any, b: Any) -> mx.array:
    """Return a b, of which one is one-hot."""
    return a.times(b) if isinstance(a, OneHot) else b.swapaxes(0, 1).times(a.T).T


def arrays_of(rows: RowProduct) -> list[mx.array]:
    """Return the arrays that rows are kept in."""
    return [x.index if isinstance(x, OneHot) else x for x in rows]


def joined(waiting: Sequence[RowProduct]) -> list[RowProduct]:
    """Return rows of several batches as one, or as two if some are one-hot and others are not."""
    dense = [rows for rows in waiting if not isinstance(rows.x, OneHot)]
    sparse = [rows for rows in waiting if isinstance(rows.x, OneHot)]
    together = []
    if dense:
        together.append(RowProduct(*(mx.concatenate(list(side)) for side in zip(*dense, strict=True))))
    if sparse:
        x = sparse[0].x
        index = mx.concatenate([rows.x.index for rows in sparse])
        together.append(RowProduct(mx.concatenate([rows.dy for rows in sparse]), OneHot(index, x.columns, x.dtype)))
    return together
