"""AdamW for LoRA, with the r x r preconditioner, as a torch.optim.Optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_one.backends.checks import check_optimizer_settings
from lora_one.core.precondition import Damping
from lora_one.errors import ModelError

from .directions import LoraPair
from .lora_adamw import LoraOneAdamW


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """The trainable LoRA pairs of the linear layers of a model."""
    pairs = []
    for module in model.modules():
        if not isinstance(module, LoraLayer) or isinstance(module.lora_A, nn.ParameterDict):  # AdaLoRA's are no pairs
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
        fused: as torch.optim.AdamW. None takes the fused kernel wherever there is one, without its offer to undo a
            GradScaler's scale in the step: whoever scales or clips gradients does so as before any other optimizer.

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
    rest = [parameter for parameter in trainable if id(parameter) not in taken]
    # A group of their own only for a rate of their own: each group is a launch of AdamW.
    faster = {id(pair.lora_B) for pair in pairs} if loraplus_lr_ratio != 1.0 else set()
    groups.append({"params": [p for p in rest if id(p) not in faster]})
    groups.append({"params": [p for p in rest if id(p) in faster], "lr": learning_rate * loraplus_lr_ratio})
    groups = [group for group in groups if group["params"]]
    there_is = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trainable)
    adamw: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps}
    adamw["fused"] = there_is if fused is None else fused
    made = LoraOneAdamW(groups, pairs, reg, damping, **adamw) if precondition else torch.optim.AdamW(groups, **adamw)
    if fused is None:
        # Lightning refuses to clip the gradients of an optimizer that would still have to take a scale out of them.
        made._step_supports_amp_scaling = False
    return made
