"""AdamW on r x r preconditioned gradients, many LoRA pairs at a time."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lora_one.core.precondition import Damping
from lora_one.errors import ModelError

from .directions import Batch, LoraPair, directions
from .precision import full_precision

# Without the hooks that torch.optim wraps around `step`: they are called around ours, once.
_ADAMW_STEP = inspect.unwrap(torch.optim.AdamW.step)


class LoraOneAdamW(torch.optim.AdamW):
    """torch.optim.AdamW that preconditions the gradients of LoRA pairs first (arXiv 2502.01235, Algorithm 1).

    gA <- (B^T B + reg I)^-1 gA and gB <- gB (A A^T + reg I)^-1, in float32 or wider, from the current A and B; all
    other parameters follow plain AdamW. `step` leaves every `.grad` as the backward pass made it.

    On an accelerator pairs of the same shapes go together, so that a step launches as many kernels for 100 layers as
    for ten; on a CPU one by one, without copies (see `directions`). Nothing waits for the device.

    Args:
        params: parameters or groups, as for torch.optim.AdamW.
        pairs: those to precondition; each must be in `params`.
        reg, damping: see `lora_one.core.precondition.damped_inverse`.
        adamw: the other arguments of torch.optim.AdamW.

    Raises:
        ModelError: a factor that is not in `params`, or that two different pairs share.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Iterable[LoraPair],
        reg: float = 1e-6,
        damping: Damping = "absolute",
        **adamw: Any,
    ):
        super().__init__(params, **adamw)
        self.pairs = _distinct(pairs)
        self.reg = reg
        self.damping: Damping = damping
        self._groups_of_factors()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "pairs": self.pairs, "reg": self.reg, "damping": self.damping}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` re-evaluates the loss first, as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factors = {id(factor) for pair in self.pairs for factor in pair}
        self._adamw([{**g, "params": [p for p in g["params"] if id(p) not in factors]} for g in self.param_groups])
        if self.pairs:
            group_of = self._groups_of_factors()
            with full_precision(self.pairs[0].lora_A.device):  # once, and not at each product
                for batch in directions(self.pairs, self.reg, self.damping):
                    self._step_along(batch, group_of)
        return loss

    def _step_along(self, batch: Batch, group_of: dict[int, int]) -> None:
        """One step of some factors, with their directions in the place of their gradients."""
        gradients = [factor.grad for factor, _ in batch]
        of_group: dict[int, list[torch.nn.Parameter]] = defaultdict(list)
        try:
            for factor, direction in batch:
                factor.grad = direction
                of_group[group_of[id(factor)]].append(factor)
            self._adamw([{**self.param_groups[index], "params": its} for index, its in of_group.items()])
        finally:
            for (factor, _), gradient in zip(batch, gradients, strict=True):
                factor.grad = gradient

    def _adamw(self, groups: list[dict[str, Any]]) -> None:
        """torch.optim.AdamW's own step, of these groups alone."""
        mine, self.param_groups = self.param_groups, groups
        try:
            _ADAMW_STEP(self)
        finally:
            self.param_groups = mine

    def _groups_of_factors(self) -> dict[int, int]:
        """id of a parameter -> its group."""
        found = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        for pair in self.pairs:
            for side, factor in pair._asdict().items():
                if id(factor) not in found:
                    raise ModelError(
                        f"each factor of a pair must be in params, got a {side} {tuple(factor.shape)} that is not"
                    )
        return found


def _distinct(pairs: Iterable[LoraPair]) -> list[LoraPair]:
    """Each pair once. Whoever shares one factor only has no preconditioner: the step of one would undo the other's."""
    found = list({(id(pair.lora_A), id(pair.lora_B)): pair for pair in pairs}.values())
    seen: set[int] = set()
    for pair in found:
        for side, factor in pair._asdict().items():
            if id(factor) in seen:
                raise ModelError(
                    f"preconditioning needs pairs of their own, got a {side} {tuple(factor.shape)} that two pairs "
                    "share: untie it, or use precondition=False"
                )
            seen.add(id(factor))
    return found
