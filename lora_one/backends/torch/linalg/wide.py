"""Products of narrow floats, summed in float32 or wider; where a GPU can, without float32 copies.

Its tensor cores multiply bfloat16 exactly and sum in float32 (G of 4096 tokens of 14336 x 4096 on an H100: 0.7 ms for
9.5, within 4e-6 of float64, where float32 arithmetic is within 3e-7 and the rounding of dy and x, in bfloat16, 2e-3).
"""

import torch
from torch import Tensor

from lora_one.backends.torch.ops import TorchOps
from lora_one.backends.torch.passes.frozen_linear import product_of_rows

BFLOAT16_PARTS = 3  # of 8 bits each: float32 has 24


widened = TorchOps().at_least_float32


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, (m, n), of large matrices (rows, m), (rows, n) of the same dtype."""
    if _wide_sums(a) and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.mT, b, out_dtype=torch.float32)
    return product_of_rows(widened(a).mT, widened(b).mT)


def times_few_columns(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, (m, n), of a (m, k) in any dtype and a narrow b (k, n) in float32 or wider."""
    if _wide_sums(a) and a.dtype == torch.bfloat16 and b.dtype == torch.float32:
        products = torch.mm(a, in_parts(b), out_dtype=torch.float32)  # (m, 3 n)
        return products.unflatten(1, (BFLOAT16_PARTS, b.shape[1])).sum(1)
    return widened(a) @ b


def few_rows_times(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, (m, n), of a flat a (m, k) in float32 or wider and a b (k, n) in any dtype."""
    return times_few_columns(b.mT, a.mT).mT if b.is_cuda else a @ widened(b)


def _wide_sums(x: Tensor) -> bool:
    """Whether torch.mm can return narrow factors' product in float32: on CUDA, not on ROCm, which says it is CUDA."""
    return x.is_cuda and torch.version.hip is None


def in_parts(x: Tensor) -> Tensor:
    """Bfloat16 matrices beside each other whose sum is x, float32."""
    parts = []
    for _ in range(BFLOAT16_PARTS):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1]
    return torch.cat(parts, dim=1)
