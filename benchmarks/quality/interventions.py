"""What is done to the first steps of the paper's start, to see whether they are why it needs another balance.

At a balance of 1/2 the trailing rows of A0 are near zero, and Adam moves every entry by about the learning rate at each
of its first steps, whatever its size. If that is what costs quality at high ranks, keeping A from going far at first
must bring back what another balance brings, without changing the start.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.preconditioner.optimizer import RuleOptimizer
from benchmarks.preconditioner.rules import Rule
from lora_one.backends.torch.optimizer import lora_pairs

FIRST = 20  # steps that an intervention lasts
Hook = Callable[[nn.Module, int, torch.optim.Optimizer], None]


def limited(change: Callable[[Tensor, Tensor], Tensor]) -> Hook:
    """Let only a part of A's first steps happen.

    Args:
        change: (rows before, rows after the optimizer's step) -> the change that is let happen; all (r, in).
    """

    @torch.no_grad()
    def after_step(model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step <= FIRST:
            for lora_A in (pair.lora_A for pair in lora_pairs(model)):
                before = optimizer.before[lora_A]  # type: ignore[attr-defined]  # of `Remembering`
                before += change(before, lora_A)
                lora_A.copy_(before)

    return after_step


class Remembering(torch.optim.AdamW):
    """AdamW that keeps a copy of the factors, as they were before its first step until a hook renews it."""

    def __init__(self, model: nn.Module, rate: float):
        parameters = [p for p in model.parameters() if p.requires_grad]
        super().__init__(parameters, lr=rate, weight_decay=0.0)
        self.before = {p: p.detach().clone() for p in parameters}


def restart(model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
    """Forget Adam's moments when the warm-up is over: what they hold is of the first, large gradients."""
    if step == FIRST // 2:
        optimizer.state.clear()


def scaled(share: float) -> Hook:
    """A at a share of the rate."""
    return limited(lambda before, after: share * (after - before))


def clamped(most: float) -> Hook:
    """No row of A changes by more than a share of its length in one step."""

    def change(before: Tensor, after: Tensor) -> Tensor:
        step = after - before
        longest = most * before.norm(dim=1, keepdim=True)  # (r, 1)
        return step * (longest / step.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)

    return limited(change)


class ByRule(torch.optim.Optimizer):
    """Adam with the r x r preconditioner at some place, see benchmarks/preconditioner/rules.py."""

    def __init__(self, model: nn.Module, rate: float, rule: Rule):
        pairs = lora_pairs(model)
        super().__init__([factor for pair in pairs for factor in pair], {"lr": rate})
        self._rules = RuleOptimizer(pairs, rule)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step at the schedule's rate."""
        self._rules.step(self.param_groups[0]["lr"])


def by_rule(place: str, damping: str, reg: float) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """The optimizer of a contender."""
    return lambda model, rate: ByRule(model, rate, Rule("adam", place, damping, reg))  # type: ignore[arg-type]
