"""Adding an adapter to the base weights, and to nothing else: weights that modules share are parted first."""

import copy
import inspect
from collections import defaultdict
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from lora_one.errors import ModelError

from .adapters import opened

_TIE = "tie_word_embeddings"


def merge(model: nn.Module) -> nn.Module:
    """See `lora_one.merge`. A layer that shares its weight with another module, as a tied output layer, gets its own.

    Raises:
        ModelError: a model of this class cannot have that.
    """
    with opened(model, "merge") as adapted:
        merged = _merged(adapted)
    vars(merged).pop("peft_config", None)  # PEFT before 0.21 leaves it
    if hasattr(merged, "_hf_peft_config_loaded"):  # of transformers' add_adapter
        merged._hf_peft_config_loaded = False
    return merged


def _merged(adapted: peft.PeftModel) -> Any:
    base: Any = adapted.get_base_model()
    shared = _shared_weights(adapted)
    tied = _tied(base, shared)
    if tied and _TIE in _source_of_forward(base):
        raise ModelError(
            f"merge would part {', '.join(tied)} from the weight it is tied to, and a {type(base).__name__} without "
            f"{_TIE} computes something else: keep the adapter by itself, or leave the layer out of the targets"
        )
    found = [(layer, dict(layer._parameters)) for layer in shared.values()]
    try:
        for layer in shared.values():
            _part(layer)
        merged: Any = adapted.base_model.merge_and_unload()
    except BaseException:
        for layer, parameters in found:
            layer._parameters.update(parameters)
        raise
    if tied:
        _untie(merged)
    return merged


def _shared_weights(model: peft.PeftModel) -> dict[str, nn.Module]:
    """The layers under LoRA with a parameter that is another module's too. One module in many places shares nothing."""
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].add(id(module))
    adapted = [(path, x) for path, x in model.get_base_model().named_modules() if isinstance(x, LoraLayer)]
    layers = {path: module.get_base_layer() for path, module in adapted}
    return {
        path: layer
        for path, layer in layers.items()
        if any(p is not None and len(owners[id(p)]) > 1 for p in layer._parameters.values())
    }


def _tied(base: nn.Module, shared: dict[str, nn.Module]) -> list[str]:
    """Those that share by transformers' doing, which would tie them again at the next load."""
    names = getattr(base, "all_tied_weights_keys", None) or {}
    tied = {name.rpartition(".")[0] for pair in names.items() for name in pair}
    return [path for path in shared if path in tied]


def _untie(base: PreTrainedModel) -> None:
    """Part all that transformers ties: without the setting it would look for each by itself."""
    ties = base.all_tied_weights_keys
    for name, other in ties.items():
        if base.get_parameter(name) is base.get_parameter(other):
            _part(base.get_submodule(name.rpartition(".")[0]))
    ties.clear()
    configs = [getattr(module, "config", None) for module in base.modules()]
    for config in configs:
        if getattr(config, _TIE, False):
            setattr(config, _TIE, False)


def _part(module: nn.Module) -> None:
    for name, parameter in module._parameters.items():
        module._parameters[name] = copy.deepcopy(parameter)


def _source_of_forward(model: nn.Module) -> str:
    try:
        return inspect.getsource(type(model).forward)
    except (OSError, TypeError):  # made at run time
        return ""
