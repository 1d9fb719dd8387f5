"""What training did to the factors: how far A went at first, and how many directions the whole update has."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Factors(NamedTuple):
    """Copies of a LoRA pair."""

    lora_A: Tensor  # (r, in)
    lora_B: Tensor  # (out, r)


def factors_by_layer(model: nn.Module) -> dict[str, Factors]:
    """The pairs of PEFT's linear layers that have the same rank all through training, by the layers' names."""
    return {
        name: Factors(*(side["default"].weight.detach().clone() for side in (module.lora_A, module.lora_B)))
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {}) and hasattr(module.lora_A["default"], "weight")
    }


def moved(start: dict[str, Factors], now: dict[str, Factors]) -> float | None:
    """|A - A0| / |A0|, the mean over layers; None without LoRA layers."""
    if not start:
        return None
    shares = [float((now[name].lora_A - old.lora_A).norm() / old.lora_A.norm()) for name, old in start.items()]
    return sum(shares) / len(shares)


def update_rank(start: dict[str, Factors], model: nn.Module, moves_base: bool) -> float | None:
    """How many directions the change of a weight has, the mean over layers; None without LoRA layers.

    It is exp of the entropy of the singular values' shares: r for r equal ones, 1 for one that outweighs all others.

    Args:
        moves_base: the start took B0 A0 off the base weight, so that the change is B A - B0 A0; else it is B A.
    """
    if not start:
        return None
    ranks = []
    for name, (lora_A, lora_B) in factors_by_layer(model).items():
        if moves_base:
            lora_A = torch.cat([lora_A, start[name].lora_A])  # (2 r, in)
            lora_B = torch.cat([lora_B, -start[name].lora_B], 1)  # (out, 2 r)
        left, right = torch.linalg.qr(lora_B.double())[1], torch.linalg.qr(lora_A.double().mT)[1]
        s = torch.linalg.svdvals(left @ right.mT)
        share = s / s.sum()
        ranks.append(float(torch.exp(-torch.xlogy(share, share).sum())))
    return float(f"{sum(ranks) / len(ranks):.4g}")
