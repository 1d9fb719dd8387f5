"""Products with the r columns of a LoRA factor, which a CPU computes as fast as products with 16 columns."""

import math

import torch
from torch import Tensor

_FLOAT32_LANES = 16  # of the widest vector register; BLAS leaves most of it empty for fewer columns


def narrow_matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b for batches (n, ., .), reading g rows of a tall operand with few columns as one row.

    Reading (rows, r) as (rows / g, g r) costs nothing where the memory is contiguous. Then

        x^T y   is the sum of the g diagonal r x r blocks of the product of the two readings,
        x m     is the reading times the block-diagonal matrix of g copies of m,

    which is g times the arithmetic in less than half the time (r = 8, g = 2).

    Args:
        out: contiguous memory for the result.
    """
    if a.device.type == "cpu" and a.ndim == b.ndim == 2 and out is None and a.mT.is_contiguous():
        return (b.mT @ a.mT).mT  # x^T y as (y^T x)^T, in three quarters of the time
    if a.device.type != "cpu" or a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0]:
        return torch.matmul(a, b, out=out)
    if a.mT.is_contiguous() and b.is_contiguous() and (g := _rows_as_one(a.shape[2], a.shape[1], b.shape[2])) > 1:
        return _gram(a.mT, b, g, out)
    if a.is_contiguous() and (g := _rows_as_one(a.shape[1], *b.shape[1:])) > 1:
        return _apply(a, b, g, out)
    return torch.matmul(a, b, out=out)


def _rows_as_one(rows: int, *columns: int) -> int:
    """Return how many rows to read as one: 1 where more does not pay."""
    if not 0 < 16 * max(columns) <= rows:
        return 1
    return math.gcd(rows, max(1, _FLOAT32_LANES // max(columns)))


def _gram(x: Tensor, y: Tensor, g: int, out: Tensor | None) -> Tensor:
    n, rows, p = x.shape
    q = y.shape[2]
    blocks = x.view(n, rows // g, g * p).mT @ y.view(n, rows // g, g * q)  # (n, g p, g q)
    return torch.sum(blocks.view(n, g, p, g, q).diagonal(dim1=1, dim2=3), -1, out=out)  # (n, p, q)


def _apply(x: Tensor, m: Tensor, g: int, out: Tensor | None) -> Tensor:
    n, rows, p = x.shape
    q = m.shape[2]
    blocks = m.new_zeros(n, g, p, g, q)
    blocks.diagonal(dim1=1, dim2=3).copy_(m[..., None])  # (n, p, q, g)
    folded = None if out is None else out.view(n, rows // g, g * q)
    return torch.matmul(x.view(n, rows // g, g * p), blocks.view(n, g * p, g * q), out=folded).view(n, rows, q)
