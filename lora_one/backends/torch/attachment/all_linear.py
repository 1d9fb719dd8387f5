"""Where "all-linear" puts LoRA, and a warning that names where it does not."""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_one.errors import ModelError, TargetsWarning

from .snapshot import Snapshot
from .tasks import heads

ALL_LINEAR = "all-linear"
LINEAR = (nn.Linear, Conv1D)

Attach = Callable[[str | Sequence[str], Sequence[str]], peft.PeftModel]  # (targets, what they leave out) -> LoRA there


class RefusedByPeft(ModelError):
    """A linear layer that PEFT takes no LoRA on, because of the model that it is in."""

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name  # the last part of its path


def on_all_linear(model: nn.Module, attach: Attach) -> peft.PeftModel:
    """LoRA on every linear layer but the output layer, new heads, gates of one output, and what PEFT refuses."""
    before = Snapshot(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR)}
    without = [name for name, x in linear.items() if isinstance(x, nn.Linear) and 1 in (x.in_features, x.out_features)]
    without += heads(model)
    attached, refused = _where_peft_lets(model, attach, linear, without)
    if wrapped := _names(attached, ParamWrapper):
        # PEFT means the layers that a mixture of experts had in transformers 4, where routers and experts were linear.
        targets = sorted(_config_of(attached).target_modules)
        before.restore()
        attached = attach(targets, [*without, *refused])
    started = _names(attached, LoraLayer)
    trained = set(_config_of(attached).modules_to_save or ())
    left = {*wrapped, *linear} - {*started, *_output_layer(model)}
    if patterns := sorted({re.sub(r"\.\d+\.", ".*.", x) for x in left if trained.isdisjoint(x.split("."))}):
        warnings.warn(
            f"no LoRA on {', '.join(patterns)}: gates of one output, routers, experts that are one parameter, what "
            f"PEFT takes for these, and layers of state-space models that their kernels do not call; it is on "
            f"{len(started)} linear layers. To have it elsewhere, name the targets",
            TargetsWarning,
            stacklevel=6,
        )
    return attached


def _where_peft_lets(
    model: nn.Module, attach: Attach, linear: Iterable[str], without: Sequence[str]
) -> tuple[peft.PeftModel, list[str]]:
    """LoRA on all linear layers but those that PEFT refuses in this kind of model, and their names."""
    before, refused = Snapshot(model), list[str]()
    while True:
        try:
            return attach(ALL_LINEAR, [*without, *refused]), refused
        except RefusedByPeft as error:
            # PEFT says no more than the first such layer.
            more = [name for name in linear if name.rpartition(".")[2] == error.name and name not in refused]
            if not more:
                raise
            before.restore()
            refused += more


def _names(attached: peft.PeftModel, kind: type[nn.Module]) -> list[str]:
    """Of the modules of a kind, as the base model has them."""
    found = [name for name, module in attached.base_model.model.named_modules() if isinstance(module, kind)]
    return [name for name in found if not name.endswith(".base_layer")]


def _config_of(attached: peft.PeftModel) -> Any:
    return attached.peft_config[attached.active_adapter]


def _output_layer(model: nn.Module) -> set[str]:
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {name for name, module in model.named_modules() if module is output}
