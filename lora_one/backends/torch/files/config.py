"""PEFT's settings of an adapter: read from a folder, and as `save` writes them, with every scale by the plain rule."""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft

from lora_one.checkpoint.folder import CONFIG
from lora_one.checkpoint.peft import AdapterFolder
from lora_one.checkpoint.plain_lora import MLX_SETTINGS
from lora_one.checkpoint.scales import plain_settings, scaling_of
from lora_one.errors import CheckpointError, LoraOneError

from .state import lora_layers


def read_config(folder: AdapterFolder) -> peft.LoraConfig:
    """Return the folder's settings, with its scales by the plain rule, so that a Trainer too saves them like that."""
    settings = {name: value for name, value in folder.config.items() if name not in MLX_SETTINGS}
    config: Any = peft.LoraConfig.from_peft_type(**settings)
    if config.use_rslora and folder.lora_A:
        layers = {path: (folder.ranks[path], folder.scalings[path]) for path in folder.lora_A}
        set_attributes(config, plain_settings(layers))
    return config


@contextmanager
def blaming_settings(folder: AdapterFolder) -> Iterator[None]:
    """Blame the folder's settings, which may be anything, for an error in the block."""
    try:
        yield
    except LoraOneError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, re.error) as error:
        raise CheckpointError(
            f"{folder.path / CONFIG}: its settings cannot be used: {type(error).__name__}: {error}"
        ) from error


def take_scales(model: peft.PeftModel, adapter: str, config: peft.LoraConfig) -> None:
    """Give the model's adapter the folder's ranks and scales, which may differ, or be given by another rule."""
    settings = config.to_dict()
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "inference_mode")
    set_attributes(model.peft_config[adapter], {name: settings[name] for name in names})
    for path, module in lora_layers(model, adapter):
        rank, scaling = module.r[adapter], scaling_of(settings, path)
        module.scaling[adapter] = scaling
        module.lora_alpha[adapter] = scaling * (math.sqrt(rank) if settings["use_rslora"] else rank)
        if isinstance(getattr(module, "use_rslora", None), dict):
            module.use_rslora[adapter] = settings["use_rslora"]


def config_to_save(model: peft.PeftModel, adapter: str) -> peft.LoraConfig:
    """Return the adapter's settings for its file: the scales that its layers have, by the plain rule."""
    base: Any = model.get_base_model()
    config: Any = copy.copy(model.peft_config[adapter])
    config.inference_mode = True
    if isinstance(config.target_modules, (set, list)):
        # Names from a compiled model would match nothing in a plain one.
        config.target_modules = sorted({name.replace("_orig_mod.", "") for name in config.target_modules})
    if config.target_parameters:
        config.target_parameters = sorted(config.target_parameters)
    config.base_model_name_or_path = config.base_model_name_or_path or base.__dict__.get("name_or_path") or None
    if config.task_type is None:  # for peft.AutoPeftModel
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    layers = {path: (module.r[adapter], module.scaling[adapter]) for path, module in lora_layers(model, adapter)}
    settings = config.to_dict()
    is_right = all(math.isclose(scaling_of(settings, path), scaling) for path, (_, scaling) in layers.items())
    if layers and (config.use_rslora or not is_right):
        set_attributes(config, plain_settings(layers))
    return config


def set_attributes(target: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(target, name, value)
