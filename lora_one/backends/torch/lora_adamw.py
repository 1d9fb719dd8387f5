"""AdamW on r x r preconditioned gradients, many LoRA pairs at a time."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_one.core.factors import Factors
from lora_one.core.precondition import Damping, precondition
from lora_one.errors import ModelError

from .ops import TorchOps
from .precision import full_precision

_OPS = TorchOps()

# Without the hooks that torch.optim wraps around `step`: they are called around ours, once.
_ADAMW_STEP = inspect.unwrap(torch.optim.AdamW.step)

# Bytes of factors that go through the step together. On a CPU few enough that factors, gradients and their copies stay
# in the cache until AdamW has read them; elsewhere all that a model usually has, and a bound on the memory it takes.
_BATCH_BYTES = {"cpu": 8 * 2**20}
_BATCH_BYTES_ELSEWHERE = 256 * 2**20


class LoraPair(NamedTuple):
    """The parameters of one LoRA layer."""

    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)


class LoraOneAdamW(torch.optim.AdamW):
    """torch.optim.AdamW that preconditions the gradients of LoRA pairs first (arXiv 2502.01235, Algorithm 1).

    gA <- (B^T B + reg I)^-1 gA and gB <- gB (A A^T + reg I)^-1, in float32 or wider, from the current A and B; all
    other parameters follow plain AdamW. `step` leaves every `.grad` as the backward pass made it.

    Pairs of the same shapes are stacked and go together, so that a step launches as many kernels for 100 layers as for
    ten (on a CPU: in batches that fit its cache). Nothing waits for the device.

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
            with full_precision(self.pairs[0].lora_A.device):  # once, and not at each product
                for pairs, groups in self._batches():
                    self._step_together(pairs, groups)
        return loss

    def _step_together(self, pairs: list[LoraPair], groups: tuple[int, int]) -> None:
        """One step of pairs that are alike in shapes, dtypes, device and groups."""
        lora_A, lora_B = zip(*pairs, strict=True)
        stacked = Factors(_stack(lora_A), _stack(lora_B))  # (n, r, in), (n, out, r)
        raw = Factors([p.grad for p in lora_A], [p.grad for p in lora_B])
        gradient = Factors(*(_gradients(*side) for side in zip(stacked, raw, strict=True)))
        direction = precondition(_OPS, stacked, gradient, self.reg, self.damping)
        try:
            for factors, gradients, directions in zip((lora_A, lora_B), raw, direction, strict=True):
                if gradients[0] is not None:
                    for factor, its in zip(factors, directions.to(factors[0].dtype).unbind(), strict=True):
                        factor.grad = its
            self._adamw(
                [{**self.param_groups[g], "params": side} for g, side in zip(groups, (lora_A, lora_B), strict=True)]
            )
        finally:
            for factors, gradients in zip((lora_A, lora_B), raw, strict=True):
                for factor, its in zip(factors, gradients, strict=True):
                    factor.grad = its

    def _batches(self) -> Iterator[tuple[list[LoraPair], tuple[int, int]]]:
        """The pairs that have gradients, those that are alike together, and the groups of their lora_A and lora_B."""
        group_of = self._groups_of_factors()
        alike: dict[Any, list[LoraPair]] = defaultdict(list)
        for pair in self.pairs:
            a, b = pair
            missing = a.grad is None, b.grad is None
            if not all(missing):
                groups = group_of[id(a)], group_of[id(b)]
                alike[groups, missing, a.shape, b.shape, a.dtype, b.dtype, a.device].append(pair)
        for (groups, *_), pairs in alike.items():
            limit = _BATCH_BYTES.get(pairs[0].lora_A.device.type, _BATCH_BYTES_ELSEWHERE)
            count = max(1, limit // sum(factor.nbytes for factor in pairs[0]))
            for start in range(0, len(pairs), count):
                yield pairs[start : start + count], groups

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


def _stack(xs: tuple[Tensor, ...]) -> Tensor:
    return xs[0][None] if len(xs) == 1 else torch.stack(xs)


def _gradients(factors: Tensor, gradients: list[Tensor | None]) -> Tensor:
    """Stacked gradients of stacked factors; zeros where there are none."""
    return torch.zeros_like(factors) if gradients[0] is None else _stack(tuple(gradients))  # type: ignore[arg-type]
