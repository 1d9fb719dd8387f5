"""The parameters of one LoRA layer, and their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_one.core.factors import Factors


class LoraPair(NamedTuple):
    """The parameters of one LoRA layer."""

    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)


Batch = list[tuple[nn.Parameter, Tensor]]  # factors that have a gradient, each with its direction


def gradient_of(pair: LoraPair) -> Factors:
    """Return the gradient of a pair; zeros for a factor without one."""
    return Factors(*(torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in pair))
