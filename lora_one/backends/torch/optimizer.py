"""AdamW for a model with LoRA layers, optionally preconditioned, as a torch.optim.Optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_one.backends.checks import check_optimizer_settings
from lora_one.backends.waiting import optimizer_made
from lora_one.core.precondition import Damping
from lora_one.errors import ModelError
from lora_one.report.deferred import StartSteps

from .attachment.kinds import factors_of
from .attachment.optimizable import check_optimizable, check_stays_whole
from .attachment.sharding import is_dtensor, shape_of
from .deferred import plan_starts
from .lora_adamw import LoraOneAdamW
from .pairs import LoraPair
from .start_state import refuse_unfinished


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """Return the trainable LoRA pairs of a model."""
    pairs = []
    for module in model.modules():
        if not isinstance(module, LoraLayer) or isinstance(module.lora_A, nn.ParameterDict):  # AdaLoRA: no pairs
            continue
        for adapter in (*module.lora_A, *module.lora_embedding_A):
            pair = factors_of(module, adapter)
            if all(len(shape_of(factor)) >= 2 and factor.requires_grad for factor in pair):
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
    start_steps: StartSteps | None = None,
) -> torch.optim.AdamW:
    """See `lora_one.optimizer` for the arguments. Here is only what is special to PyTorch.

    `model` may be a PeftModel, or any module that contains PEFT's LoRA layers. `learning_rate` does not apply to
    parameters in `param_groups` that have their own "lr". With the default `fused=None`, unscale and clip gradients as
    with an optimizer that is not fused.

    >>> import lora_one, torch
    >>> from lora_one.backends.torch import attach_plain, optimizer
    >>> model = attach_plain(torch.nn.Sequential(torch.nn.Linear(8, 4)), lora_one.Config(rank=2, targets=["0"]))
    >>> adamw = optimizer(model, learning_rate=1e-3, loraplus_lr_ratio=4.0)
    >>> [group["lr"] for group in adamw.param_groups]
    [0.001, 0.004]
    """
    check_optimizer_settings(reg, damping, loraplus_lr_ratio)
    check_optimizable(model, precondition, loraplus_lr_ratio)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError("the model must have trainable parameters, got none: load the adapter with trainable=True")
    pairs = lora_pairs(model)
    if precondition and not pairs:
        raise ModelError("precondition=True needs trainable LoRA layers of PEFT, got none")
    groups = _param_groups(trainable, pairs, param_groups, learning_rate, loraplus_lr_ratio)
    has_fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trainable)
    adamw: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps}
    adamw["fused"] = has_fused if fused is None else fused
    start = plan_starts(model, start_steps)
    if precondition or start is not None:
        check_stays_whole(model)
    made: torch.optim.AdamW
    if precondition or start is not None:
        made = LoraOneAdamW(groups, pairs if precondition else (), reg, damping, start, **adamw)
    else:
        made = torch.optim.AdamW(groups, **adamw)
    if start is None:
        made.register_load_state_dict_pre_hook(refuse_unfinished)
    if fused is None:
        # Lightning refuses to clip the gradients of an optimizer that would still have to divide them by a scale.
        made._step_supports_amp_scaling = False
    optimizer_made(model, made)
    return made


def _param_groups(
    trainable: list[nn.Parameter],
    pairs: list[LoraPair],
    given: Iterable[dict[str, Any]],
    learning_rate: float,
    loraplus_lr_ratio: float,
) -> list[dict[str, Any]]:
    groups = [{**group, "params": list(group["params"])} for group in given]
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    remaining = [parameter for parameter in trainable if id(parameter) not in taken]
    # lora_B gets its own group only for its own rate: each group is a launch of AdamW.
    faster = {id(pair.lora_B) for pair in pairs} if loraplus_lr_ratio != 1.0 else set()
    groups.append({"params": [p for p in remaining if id(p) not in faster]})
    groups.append({"params": [p for p in remaining if id(p) in faster], "lr": learning_rate * loraplus_lr_ratio})
    # One launch does not take both kinds, which tensor parallelism mixes.
    kinds = [{**group, "params": [p for p in group["params"] if is_dtensor(p) == kind]} for group in groups
             for kind in (False, True)]  # fmt: skip
    return [group for group in kinds if group["params"]]
