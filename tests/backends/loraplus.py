"""LoRA+ in float64 by PyTorch's optimizer, which other frameworks are compared with."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

import lora_one
from lora_one.backends.torch import attach_plain
from lora_one.core.factors import Factors

Pairs = Mapping[Any, Factors]  # by any name, (r, in) and (out, r)


def trained_by_torch(
    pairs: Pairs, gradients: Sequence[Pairs], rate: float, schedule: Callable[[int], float], **options: Any
) -> dict[Hashable, Factors]:
    """Return the pairs after a step of `lora_one.optimizer` for each of the gradients, at rate * schedule(step)."""
    shapes = [(lora_A.shape[1], lora_B.shape[0]) for lora_A, lora_B in pairs.values()]
    base = torch.nn.Sequential(*(torch.nn.Linear(*shape, dtype=torch.float64) for shape in shapes))
    rank = next(iter(pairs.values())).lora_A.shape[0]
    model = attach_plain(base, lora_one.Config(rank=rank, targets=[str(i) for i in range(len(pairs))])).double()
    factors = {
        name: [
            getattr(model.get_submodule(f"base_model.model.{i}"), side)["default"].weight for side in Factors._fields
        ]
        for i, name in enumerate(pairs)
    }
    with torch.no_grad():
        for name, pair in pairs.items():
            for parameter, value in zip(factors[name], pair, strict=True):
                parameter.copy_(torch.tensor(value))
    adamw = lora_one.optimizer(model, rate, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, schedule)
    for of_step in gradients:
        for name, gradient in of_step.items():
            for parameter, value in zip(factors[name], gradient, strict=True):
                parameter.grad = torch.tensor(value).contiguous()  # as backward leaves it: the fused AdamW needs it
        adamw.step()
        scheduler.step()
    return {name: Factors(*(x.detach().numpy() for x in pair)) for name, pair in factors.items()}
