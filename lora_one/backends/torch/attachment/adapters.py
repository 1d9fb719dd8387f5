"""The adapter that a model has already: as a PeftModel, injected into its layers, or left by an earlier call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from lora_one.errors import AdapterWarning, ModelError, warn_user

from .refusals import kind_of
from .starts import check_base_is_whole
from .wrappers import plain_names, unwrapped

_OURS = "attached_by_lora_one"  # an attribute of PEFT's configuration, not a field, so it is in no file


def adapter_of(model: nn.Module) -> peft.PeftModel | None:
    """Return the adapter of a model as a PeftModel: the model itself, or a view of layers that were injected into it.

    A view shares the model's modules and changes nothing in it.

    Raises:
        ModelError: PEFT's layers do not belong to the model as a whole, or a PeftModel has lost its layers.
    """
    if isinstance(model, peft.PeftModel):
        _check_in_force(model)
        return model
    layers = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    configs: Any = vars(model).get("peft_config")
    if layers and not configs:
        owners = [path for path, module in model.named_modules() if path and "peft_config" in vars(module)]
        where = f"hand in the module that has it, {owners[0]!r}" if owners else "hand in the PeftModel"
        raise ModelError(
            f"{layers[0]}: an adapter of PEFT inside a {type(model).__name__} that is no PeftModel; {where}. "
            "A loss_fn may use the whole model"
        )
    return _view(model, configs) if layers else None


@contextmanager
def opened(model: nn.Module, verb: str) -> Iterator[peft.PeftModel]:
    """Open the adapter of a model, with the layer names of the plain model.

    Raises:
        ModelError: the model has no adapter, or one that is not LoRA.
    """
    inner = unwrapped(model)
    with plain_names(inner):
        adapted = adapter_of(inner)
        if adapted is None:
            raise ModelError(
                f"{verb} needs a model with LoRA layers, as lora_one.init returns it, got {type(inner).__name__} "
                "without any"
            )
        require_lora(adapted, verb)
        yield adapted


def require_lora(adapted: peft.PeftModel, verb: str) -> None:
    """Check that an adapter is LoRA.

    Raises:
        ModelError: it is another of PEFT's kinds.
    """
    if kind := kind_of(adapted):
        raise ModelError(
            f"{verb} needs an adapter that is LoRA, got {kind}: use PEFT's own functions for it, or hand in the base "
            "model without it"
        )


def mark_as_ours(adapted: peft.PeftModel) -> None:
    """Mark an adapter as attached by lora_one, so that `is_leftover` recognises it in its base model."""
    for config in adapted.peft_config.values():
        setattr(config, _OURS, True)


def is_leftover(model: nn.Module, adapted: peft.PeftModel | None) -> bool:
    """Return whether a model that looks plain still has the adapter that an earlier `init` or `load` attached."""
    return adapted is not None and adapted is not model and all(hasattr(c, _OURS) for c in adapted.peft_config.values())


def take_out_leftover(model: nn.Module) -> None:
    """Remove the adapter of an earlier call from its base model. A `Snapshot` can put it back.

    Raises:
        ModelError: the adapter is not ours, or it changed the base weights.
    """
    adapted = adapter_of(model)
    if adapted is None:
        return
    if not is_leftover(model, adapted):
        raise ModelError(
            f"a model without an adapter is expected, got one that has {sorted(adapted.peft_config)} already: "
            "lora_one.init starts that one again; to be rid of it, take it out with PEFT's unload()"
        )
    check_base_is_whole(adapted)
    _check_base_is_left(adapted)
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ModelError(
                f"{path}: the adapter of an earlier call is merged into the base weight; call unmerge_adapter() of "
                "the model that this call returned first"
            )
        for name, child in list(module._modules.items()):
            if isinstance(child, AuxiliaryTrainingWrapper):
                module._modules[name] = _original(child)
            elif isinstance(child, BaseTunerLayer):
                module._modules[name] = child.get_base_layer()
    del model.peft_config
    warn_user(
        "the model still has the adapter that an earlier call of init, load or attach_plain put into it, in place: it "
        "is taken out, and the model that this call returned loses it. To keep both, give each a base model of its own",
        AdapterWarning,
    )


def _check_base_is_left(adapted: peft.PeftModel) -> None:
    for config in adapted.peft_config.values():
        changed = [name for name in ("bias", "layer_replication") if getattr(config, name, None) not in (None, "none")]
        if changed:
            raise ModelError(
                f"the model still has the adapter of an earlier call, whose {changed[0]}="
                f"{getattr(config, changed[0])!r} changed the base model itself: open the base model anew"
            )


def _original(wrapper: Any) -> nn.Module:
    return wrapper.original_module if hasattr(wrapper, "original_module") else wrapper.token_adapter.get_base_layer()


def _check_in_force(model: peft.PeftModel) -> None:
    base: Any = getattr(model.base_model, "model", None)
    configs = vars(base).get("peft_config") if isinstance(base, nn.Module) else None
    if configs is not None and configs is not model.peft_config:
        raise ModelError(
            "the base model of this PeftModel has been given another adapter since, in place of this one's: use the "
            "model that the later call of init, load or attach_plain returned"
        )


def _view(model: nn.Module, configs: dict[str, Any]) -> peft.PeftModel:
    """Return what `get_peft_model` would return for the layers, without injecting any."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    kind = configs[active[0]].peft_type if active else next(iter(configs.values())).peft_type
    tuner: Any = _bare(PEFT_TYPE_TO_TUNER_MAPPING[kind])
    tuner.model, tuner.peft_config = model, configs
    tuner.active_adapter = active[0] if len(active) == 1 else active
    view: Any = _bare(peft.PeftModel)
    view.base_model, view.peft_type, view.active_adapter = tuner, kind, tuner.active_adapter
    view._is_prompt_learning, view._peft_config = False, None
    view.special_peft_forward_args = set()
    return view


def _bare(cls: type[nn.Module]) -> nn.Module:
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module
