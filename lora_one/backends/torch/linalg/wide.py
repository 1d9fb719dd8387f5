"""Products of bfloat16 and float16 matrices, summed in float32 or wider; on a GPU without float32 copies of them.

A GPU's tensor cores multiply bfloat16 exactly and sum in float32. Forming G of 4096 tokens of a 14336 x 4096 layer
takes 0.7 ms that way on an H100, against 9.5 ms in float32 arithmetic. Its error is 4e-6 against float64; the error of
float32 arithmetic is 3e-7. Both are far below the rounding of dy and x to bfloat16, which is 2e-3.
"""

import torch
from torch import Tensor

from .onednn import product_of_rows
from .precision import widened

BFLOAT16_PARTS = 3  # of 8 bits each: float32 has 24


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b, (m, n), of large matrices (rows, m), (rows, n) of the same dtype; b may be sparse."""
    if b.is_sparse:
        return torch.sparse.mm(b.mT, widened(a)).mT
    if _has_wide_sums(a) and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.mT, b, out_dtype=torch.float32)
    return product_of_rows(widened(a).mT, widened(b).mT)


def times_few_columns(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, (..., m, n), of a (..., m, k) in any dtype and a narrow b (..., k, n) in float32 or wider."""
    if _has_wide_sums(a) and a.dtype == torch.bfloat16 and b.dtype == torch.float32:
        multiply = torch.mm if a.ndim == 2 else torch.bmm
        products = multiply(a, in_parts(b), out_dtype=torch.float32)  # (..., m, 3 n)
        return products.unflatten(-1, (BFLOAT16_PARTS, b.shape[-1])).sum(-2)
    return widened(a) @ b


def in_parts(x: Tensor) -> Tensor:
    """Return bfloat16 matrices, side by side, whose sum is the float32 matrix `x`."""
    parts = []
    for _ in range(BFLOAT16_PARTS):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1]
    return torch.cat(parts, dim=-1)


def _has_wide_sums(x: Tensor) -> bool:
    """Return whether torch.mm can give the product of narrow floats in float32: on CUDA only.

    ROCm calls itself CUDA but cannot.
    """
    return x.is_cuda and torch.version.hip is None
