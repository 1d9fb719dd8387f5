"""The layers that "all-linear" puts LoRA on, and a warning that names the layers it leaves out."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_one.errors import ModelError, TargetsWarning, warn_user

from .snapshot import Snapshot
from .tasks import heads

ALL_LINEAR = "all-linear"
LINEAR = (nn.Linear, Conv1D)

Attach = Callable[
    [str | Sequence[str], Sequence[str]], peft.PeftModel
]  # (targets, layers to leave out) -> the model with LoRA


class RefusedByPeft(ModelError):
    """A linear layer that PEFT refuses to put LoRA on, because of the model that contains it."""

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name  # the last part of its path


def on_all_linear(model: nn.Module, attach: Attach) -> peft.PeftModel:
    """Put LoRA on every linear layer except the output layer, new heads, gates of one output, and what PEFT refuses."""
    before = Snapshot(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR)}
    excluded = [name for name, x in linear.items() if isinstance(x, nn.Linear) and 1 in (x.in_features, x.out_features)]
    excluded += heads(model)
    attached, refused = _attach_where_peft_can(model, attach, linear, excluded)
    if wrapped := _names(attached, ParamWrapper):
        # PEFT's targets are those of a mixture of experts in transformers 4, where routers and experts were linear.
        targets = sorted(_config_of(attached).target_modules)
        before.restore()
        attached = attach(targets, [*excluded, *refused])
    started = _names(attached, LoraLayer)
    trained = set(_config_of(attached).modules_to_save or ())
    left_out = {*wrapped, *linear} - {*started, *_output_layer(model)}
    if patterns := sorted({re.sub(r"\.\d+\.", ".*.", x) for x in left_out if trained.isdisjoint(x.split("."))}):
        warn_user(
            f"no LoRA on {', '.join(patterns)}: gates of one output, routers, experts that are one parameter, what "
            f"PEFT takes for these, and layers of state-space models that their kernels do not call; it is on "
            f"{len(started)} linear layers. To have it elsewhere, name the targets, such as 'experts.down_proj'",
            TargetsWarning,
        )
    return attached


def _attach_where_peft_can(
    model: nn.Module, attach: Attach, linear: Iterable[str], excluded: Sequence[str]
) -> tuple[peft.PeftModel, list[str]]:
    """Put LoRA on all linear layers except those that PEFT refuses in this kind of model; return those too."""
    before, refused = Snapshot(model), list[str]()
    while True:
        try:
            return attach(ALL_LINEAR, [*excluded, *refused]), refused
        except RefusedByPeft as error:
            # PEFT names only the first such layer.
            alike = [name for name in linear if name.rpartition(".")[2] == error.name and name not in refused]
            if not alike:
                raise
            before.restore()
            refused += alike


def _names(attached: peft.PeftModel, kind: type[nn.Module]) -> list[str]:
    """Return the names that the modules of a kind have in the base model."""
    names = [name for name, module in attached.base_model.model.named_modules() if isinstance(module, kind)]
    return [name for name in names if not name.endswith(".base_layer")]


def _config_of(attached: peft.PeftModel) -> Any:
    return attached.peft_config[attached.active_adapter]


def _output_layer(model: nn.Module) -> set[str]:
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {name for name, module in model.named_modules() if module is output}
