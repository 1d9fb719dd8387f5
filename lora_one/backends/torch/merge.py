"""Add an adapter to the base weights, and to nothing else: modules that share a weight first get their own."""

import copy
import inspect
from collections import defaultdict
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from lora_one.errors import ModelError

from .attachment.adapters import opened
from .attachment.dora import has_magnitudes
from .attachment.sharding import check_separable, is_sharded
from .attachment.tensor_parallel import group_size
from .processes import Processes

_TIE = "tie_word_embeddings"


def merge(model: nn.Module) -> nn.Module:
    """See `lora_one.merge`. A layer that shares its weight with another module, as a tied output layer, gets its own.

    Raises:
        ModelError: there is no LoRA adapter to merge, or the model's class does not allow to separate tied weights.
    """
    processes = Processes("lora_one.merge", alone=not is_sharded(model))
    with processes.together(), opened(model, "merge") as adapted:
        merged = _merged(adapted)
    vars(merged).pop("peft_config", None)  # PEFT before 0.21 leaves it there
    if hasattr(merged, "_hf_peft_config_loaded"):  # set by transformers' add_adapter
        merged._hf_peft_config_loaded = False
    return merged


def _merged(adapted: peft.PeftModel) -> Any:
    base: Any = adapted.get_base_model()
    if group_size(adapted) > 1:
        raise ModelError(
            "the weights are split by tensor parallelism, where PEFT cannot merge: save the adapter, then load it onto "
            "the whole model and merge there"
        )
    if has_magnitudes(adapted) and is_sharded(adapted):
        raise ModelError(
            "DoRA divides by norms of whole rows, and the weights are spread over processes: save the adapter, then "
            "load it onto the whole model and merge there"
        )
    check_separable(adapted, base)
    shared = _shared_layers(adapted)
    flag_counts = _TIE in _source_of_forward(base)
    if flag_counts and (tied := _tied(base, shared)):
        raise ModelError(
            f"merge would part {', '.join(tied)} from the weight it is tied to, and a {type(base).__name__} without "
            f"{_TIE} computes something else: keep the adapter by itself, or leave the layer out of the targets"
        )
    _check_tokens(adapted)
    before = [(module, module._modules["base_layer"]) for module in shared.values()]
    try:
        for module in shared.values():
            module._modules["base_layer"] = _with_own_parameters(module.get_base_layer())
        merged: Any = adapted.base_model.merge_and_unload()
    except BaseException:
        for module, layer in before:
            module._modules["base_layer"] = layer
        raise
    if not flag_counts and any(merged.get_parameter(x) is not merged.get_parameter(y) for x, y in _ties(merged)):
        _untie(merged)
    return merged


def _shared_layers(model: peft.PeftModel) -> dict[str, LoraLayer]:
    """Return the LoRA layers whose base layer, or a parameter of it, is also elsewhere in the model.

    A LoRA layer that is itself in many places, or called many times, shares nothing.
    """
    places, owners = defaultdict[int, int](int), _owners(model)
    for module in model.modules():
        for child in module._modules.values():
            places[id(child)] += 1
    adapted = [(path, x) for path, x in model.get_base_model().named_modules() if isinstance(x, LoraLayer)]
    return {
        path: module
        for path, module in adapted
        if places[id(layer := module.get_base_layer())] > 1
        or any(len(owners[id(p)]) > 1 for p in layer._parameters.values() if p is not None)
    }


def _check_tokens(model: peft.PeftModel) -> None:
    """Check that trained tokens can be merged.

    Merging writes them into the weight in place. All modules that share the weight must have the same trained tokens.

    Raises:
        ModelError: they do not, or PEFT cannot merge them.
    """
    owners = _owners(model)
    wrappers: dict[int, Any] = {}  # id of the wrapped layer -> its wrapper
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            wrappers[id(module.token_adapter.get_base_layer())] = module
    for path, module in model.get_base_model().named_modules():
        has_tokens = isinstance(module, TrainableTokensWrapper)
        if (isinstance(module, LoraLayer) and isinstance(module.base_layer, TrainableTokensWrapper)) or (
            has_tokens and isinstance(module.token_adapter.base_layer, LoraLayer)
        ):
            raise ModelError(
                f"{path}: PEFT merges either LoRA or trained tokens of one layer, and it has both (tied layers train "
                "the same tokens): keep the adapter by itself"
            )
        if not has_tokens:
            continue
        weight = module.token_adapter.get_base_layer().weight
        sharing = [wrappers.get(owner) for owner in owners[id(weight)]]
        deltas = {None if x is None else id(x.token_adapter.trainable_tokens_delta) for x in sharing}
        if len(deltas) > 1:
            raise ModelError(
                f"{path}: merge would put its trained tokens into a weight that another module shares, without these "
                "tokens: keep the adapter by itself, or train the tokens of both"
            )


def _owners(model: nn.Module) -> dict[int, set[int]]:
    """Return id of a parameter -> ids of the modules that contain it."""
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].add(id(module))
    return owners


def _ties(base: nn.Module) -> list[tuple[str, str]]:
    """Return pairs of paths: the parameters that transformers ties."""
    return list((getattr(base, "all_tied_weights_keys", None) or {}).items())


def _tied(base: nn.Module, shared: dict[str, LoraLayer]) -> list[str]:
    """Return the shared layers that transformers has tied, and would tie again at the next load."""
    tied = {name.rpartition(".")[0] for pair in _ties(base) for name in pair}
    return [path for path in shared if path in tied]


def _untie(base: PreTrainedModel) -> None:
    """Separate all parameters that transformers ties: without its setting it expects each of them in the file."""
    for name, other in _ties(base):
        path, _, parameter = name.rpartition(".")
        if base.get_parameter(name) is base.get_parameter(other):
            module = base.get_submodule(path)
            module._parameters[parameter] = copy.deepcopy(module._parameters[parameter])
    base.all_tied_weights_keys.clear()
    for module in base.modules():
        config = getattr(module, "config", None)
        if getattr(config, _TIE, False):
            setattr(config, _TIE, False)


def _with_own_parameters(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer that shares no parameters with it."""
    own = copy.copy(layer)
    own._parameters = {name: copy.deepcopy(parameter) for name, parameter in layer._parameters.items()}
    return own


def _source_of_forward(model: nn.Module) -> str:
    try:
        return inspect.getsource(type(model).forward)
    except (OSError, TypeError):  # a class made at run time
        return ""
