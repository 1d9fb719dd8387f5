"""AdamW for LoRA, with the r x r preconditioner, as a torch.optim.Optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_one.backends.checks import check_optimizer_settings
from lora_one.core.factors import Factors
from lora_one.core.precondition import Damping, apply_inverses, damped_inverse, grams
from lora_one.errors import ModelError

from .ops import TorchOps
from .precision import full_precision

_OPS = TorchOps()


class LoraPair(NamedTuple):
    """The parameters of one LoRA layer."""

    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)


class LoraOneAdamW(torch.optim.AdamW):
    """torch.optim.AdamW that preconditions the gradients of LoRA pairs first (arXiv 2502.01235, Algorithm 1).

    gA <- (B^T B + reg I)^-1 gA and gB <- gB (A A^T + reg I)^-1, in float32 or wider, from the current A and B; all
    other parameters follow plain AdamW. `step` leaves every `.grad` as the backward pass made it.

    Args:
        params: parameters or groups, as for torch.optim.AdamW.
        pairs: those to precondition; each must be in `params`.
        reg, damping: see `lora_one.core.precondition.damped_inverse`.
        adamw: the other arguments of torch.optim.AdamW.
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
        self.pairs = list(pairs)
        self.reg = reg
        self.damping: Damping = damping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` re-evaluates the loss first, as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        raw = [(parameter, parameter.grad) for pair in self.pairs for parameter in pair]
        try:
            if self.pairs:
                with full_precision(self.pairs[0].lora_A.device):  # once, and not at each product
                    for pair, direction in _preconditioned(self.pairs, self.reg, self.damping):
                        _set_gradient(pair.lora_A, direction.lora_A)
                        _set_gradient(pair.lora_B, direction.lora_B)
            super().step()
        finally:
            for parameter, gradient in raw:
                parameter.grad = gradient
        return loss


def _preconditioned(pairs: Iterable[LoraPair], reg: float, damping: Damping) -> Iterable[tuple[LoraPair, Factors]]:
    """Each pair that has gradients, with their preconditioned form; the r x r inverses of one rank go in one batch."""
    batches: dict[Any, list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        if pair.lora_A.grad is not None or pair.lora_B.grad is not None:
            a = pair.lora_A
            batches[a.shape[0], a.device, torch.promote_types(a.dtype, torch.float32)].append(pair)
    for batch in batches.values():
        both = [gram for pair in batch for gram in grams(_OPS, Factors(pair.lora_A, pair.lora_B))]
        inverses = damped_inverse(_OPS, torch.stack(both), reg, damping)  # (2 pairs, r, r)
        for index, pair in enumerate(batch):
            gradient = Factors(_gradient(pair.lora_A), _gradient(pair.lora_B))
            yield pair, apply_inverses(_OPS, gradient, inverses[2 * index], inverses[2 * index + 1])


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _set_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad = gradient.to(parameter.dtype)


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """The trainable LoRA pairs of the linear layers of a model."""
    pairs = []
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.lora_A:
            pair = LoraPair(module.lora_A[adapter].weight, module.lora_B[adapter].weight)
            if all(factor.ndim == 2 and factor.requires_grad for factor in pair):
                pairs.append(pair)
    return pairs


def optimizer(
    model: nn.Module,
    learning_rate: float = 2e-4,
    weight_decay: float = 0.0,
    precondition: bool = False,
    reg: float = 1e-6,
    damping: Damping = "absolute",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    loraplus_lr_ratio: float = 1.0,
    param_groups: Iterable[dict[str, Any]] = (),
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of a model with LoRA layers.

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers in it.
        learning_rate: of all parameters but lora_B's, if `loraplus_lr_ratio` is not 1, and those in `param_groups`.
        weight_decay: decoupled.
        precondition: whether LoRA pairs are preconditioned; other parameters never are. Off by default: under AdamW it
            did harm at every damping on both tasks it was measured on (benchmarks/results/demo.json).
        reg, damping: see `lora_one.core.precondition.damped_inverse`.
        betas, eps: Adam's.
        loraplus_lr_ratio: lora_B's learning rate over lora_A's (LoRA+, arXiv 2402.12354).
        param_groups: groups with settings of their own, as for torch.optim: their "params" are taken out of the rest.
        fused: as torch.optim.AdamW; None takes the fused kernel wherever there is one.

    Returns:
        A torch.optim.AdamW; a `LoraOneAdamW` with `precondition=True`.

    Raises:
        ConfigError: a setting that cannot be.
        ModelError: nothing is trainable, or nothing to precondition.
    """
    check_optimizer_settings(reg, damping, loraplus_lr_ratio)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError("the model must have trainable parameters, got none: load the adapter with trainable=True")
    pairs = lora_pairs(model)
    if precondition and not pairs:
        raise ModelError("precondition=True needs trainable LoRA layers of PEFT, got none")
    groups = [{**group, "params": list(group["params"])} for group in param_groups]
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    side_b = {id(pair.lora_B) for pair in pairs}
    rest = [parameter for parameter in trainable if id(parameter) not in taken]
    groups.append({"params": [p for p in rest if id(p) not in side_b]})
    groups.append({"params": [p for p in rest if id(p) in side_b], "lr": learning_rate * loraplus_lr_ratio})
    groups = [group for group in groups if group["params"]]
    if fused is None:
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trainable)
    adamw = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps, "fused": fused}
    if not precondition:
        return torch.optim.AdamW(groups, **adamw)  # type: ignore[arg-type]
    return LoraOneAdamW(groups, pairs, reg, damping, **adamw)
