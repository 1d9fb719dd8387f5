"""The parameters of one LoRA layer, and their gradients."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_one.core.factors import Factors

STACK_BYTES = 256 * 2**20  # of factors that are computed together at most, which bounds the memory that this takes


class LoraPair(NamedTuple):
    """The parameters of one LoRA layer; those of a convolution have more axes, see `as_matrix`."""

    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)


def as_matrix(factor: Tensor) -> Tensor:
    """Return a factor, or its gradient, as a matrix, (r, in) or (out, r): a convolution's has more axes."""
    return factor if factor.ndim <= 2 else factor.flatten(1)


Batch = list[tuple[nn.Parameter, Tensor]]  # factors that have a gradient, each with its direction


def stacks(pairs: list[LoraPair], most: int) -> Iterator[list[LoraPair]]:
    """Yield pairs of equal shapes, as many at a time as have `most` bytes of whole factors."""
    count = max(1, most // sum(factor.numel() * factor.element_size() for factor in pairs[0]))
    for start in range(0, len(pairs), count):
        yield pairs[start : start + count]


def gradient_of(pair: LoraPair) -> Factors:
    """Return the gradient of a pair, as matrices; zeros for a factor without one."""
    return Factors(*(as_matrix(torch.zeros_like(x) if x.grad is None else x.grad) for x in pair))
