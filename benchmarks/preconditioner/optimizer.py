"""A `Rule` on the LoRA pairs of a PyTorch model."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lora_one.backends.torch import ops
from lora_one.backends.torch.optimizer import LoraPair
from lora_one.core.factors import Factors

from .rules import Rule, start, step


class RuleOptimizer:
    """Steps the pairs by a rule, those of one shape stacked: lora_A (n, r, in), lora_B (n, out, r)."""

    def __init__(self, pairs: Iterable[LoraPair], rule: Rule):
        groups: dict[Any, list[LoraPair]] = defaultdict(list)
        for pair in pairs:
            groups[pair.lora_A.shape, pair.lora_B.shape].append(pair)
        self._rule = rule
        self._groups = list(groups.values())
        self._states = [start(ops, _stack(group)) for group in self._groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step by the gradients that are there, which it clears."""
        for index, group in enumerate(self._groups):
            gradient = _stack([LoraPair(_grad(pair.lora_A), _grad(pair.lora_B)) for pair in group])
            new, self._states[index] = step(ops, self._rule, _stack(group), gradient, self._states[index], rate)
            for pair, lora_A, lora_B in zip(group, *new, strict=True):
                pair.lora_A.copy_(lora_A)
                pair.lora_B.copy_(lora_B)
                pair.lora_A.grad = pair.lora_B.grad = None


def _stack(pairs: Iterable[Any]) -> Factors:
    return Factors(*(torch.stack(list(side)).detach() for side in zip(*pairs, strict=True)))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
