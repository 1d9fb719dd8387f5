"""Adapters of PyTorch models on disk: PEFT's files, with every scale by the plain rule, read after our own checks."""

import copy
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_one.backends.torch.attachment.adapters import (
    adapter_of,
    is_leftover,
    mark_as_ours,
    opened,
    require_lora,
    take_out_leftover,
)
from lora_one.backends.torch.attachment.attach import PEFT_WARNINGS
from lora_one.backends.torch.attachment.snapshot import Snapshot
from lora_one.backends.torch.attachment.starts import base_weights_kept, check_start
from lora_one.backends.torch.attachment.wrappers import plain_names, unwrapped
from lora_one.checkpoint.folder import CONFIG, WEIGHTS
from lora_one.checkpoint.peft import AdapterFolder, read_folder
from lora_one.checkpoint.plain_lora import MLX_SETTINGS
from lora_one.checkpoint.scales import plain_settings, scaling_of
from lora_one.errors import CheckpointError, LoraOneError, ModelError

from .embeddings import added_rows
from .fit import problems_after, problems_before
from .state import active_adapter, adapter_state, lora_layers, tokens_of_others, train_adapter


def save(model: nn.Module, path: Path) -> None:
    """See `lora_one.save`. The active adapter alone; with it the rows of tokens that were added to the base model."""
    with opened(model, "save") as adapted:
        adapter = active_adapter(adapted, "save")
        tensors = {**adapter_state(adapted, adapter), **added_rows(adapted)}
        config = _config_on_disk(adapted, adapter)
        if empty := [key for key, tensor in tensors.items() if tensor.is_meta]:
            raise ModelError(
                f"{empty[0]}: it holds no numbers, as low_cpu_mem_usage=True makes weights, and offloading; load the "
                "adapter's weights first, or the model where it fits"
            )
        path.mkdir(parents=True, exist_ok=True)
        save_file(_separate(tensors), path / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(path))


def load(model: nn.Module, path: Path, trainable: bool) -> nn.Module:
    """See `lora_one.load`."""
    base = unwrapped(model)
    with plain_names(base):
        adapted = adapter_of(base)
        present = None if is_leftover(base, adapted) else adapted  # what the folder's factors go into
        if present is not None:
            require_lora(present, "load")
        plain = base if adapted is None else adapted.get_base_model()
        held = None if present is None else present.peft_config[active_adapter(present, "load")]
        folder = read_folder(path)
        with _settings_of(folder):
            config = _read_config(folder)
            problems = problems_before(folder, config, plain, held) + check_start(folder, present)
        _refuse(folder, problems)
        loaded = _load(base, present, folder, config, trainable)
    return model if present is not None else loaded


def _load(
    base: nn.Module, present: peft.PeftModel | None, folder: AdapterFolder, config: peft.LoraConfig, trainable: bool
) -> peft.PeftModel:
    found, depth = Snapshot(base), _depth(base)
    config.inference_mode = not trainable
    existing = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    overwritten: list[tuple[Tensor, Tensor]] = []
    with base_weights_kept(base, folder):
        try:
            adapted = _attach(base, config, folder) if present is None else present
            adapter = active_adapter(adapted, "load")
            _refuse(folder, problems_after(folder, config, adapted, adapter))
            state = {**adapted.state_dict(keep_vars=True), **adapter_state(adapted, adapter)}
            # PEFT writes some weights of embeddings twice, under a second name that nothing reads.
            tensors = {key: tensor for key, tensor in load_file(folder.path / WEIGHTS).items() if key in state}
            overwritten += [(state[key], state[key].detach().clone()) for key in tensors if id(state[key]) in existing]
            unused = dict.fromkeys(tokens_of_others(adapted, adapter), torch.empty(0))
            peft.set_peft_model_state_dict(adapted, {**tensors, **unused}, adapter)
        except BaseException:
            found.restore()
            _set(getattr(base, "config", None), depth)
            with torch.no_grad():
                for tensor, before in overwritten:
                    tensor.copy_(before)
            raise
    if present is None:
        mark_as_ours(adapted)
    else:
        _take_scales(adapted, adapter, config)
    train_adapter(adapted, adapter, trainable)
    found.restore_modes(adapted if present is None else base)
    return adapted


def _depth(model: nn.Module) -> dict[str, Any]:
    """What PEFT changes in a model's configuration where an adapter replicates layers."""
    config: Any = getattr(model, "config", None)
    return {"num_hidden_layers": config.num_hidden_layers} if hasattr(config, "num_hidden_layers") else {}


def _refuse(folder: AdapterFolder, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"the adapter in {folder.path} does not fit the model", problems)


def _read_config(folder: AdapterFolder) -> peft.LoraConfig:
    """The folder's settings, with its scales by the plain rule, so that a Trainer saves them so too."""
    settings = {name: value for name, value in folder.config.items() if name not in MLX_SETTINGS}
    config: Any = peft.LoraConfig.from_peft_type(**settings)
    if config.use_rslora and folder.lora_A:
        layers = {path: (folder.ranks[path], folder.scalings[path]) for path in folder.lora_A}
        _set(config, plain_settings(layers))
    return config


@contextmanager
def _settings_of(folder: AdapterFolder) -> Iterator[None]:
    """Whatever goes wrong with an adapter's settings, which may be anything, is told of the file that they are in."""
    try:
        yield
    except LoraOneError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, re.error) as error:
        raise CheckpointError(
            f"{folder.path / CONFIG}: its settings cannot be used: {type(error).__name__}: {error}"
        ) from error


def _attach(model: nn.Module, config: peft.LoraConfig, folder: AdapterFolder) -> peft.PeftModel:
    take_out_leftover(model)
    name, config.base_model_name_or_path = config.base_model_name_or_path, None  # PEFT warns where it changes it
    # PEFT draws a start, which is overwritten: the user's random stream should not notice.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        for message in PEFT_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            adapted: Any = peft.get_peft_model(model, config)
        except Exception as error:  # of whatever kind: what its configuration asks for is not ours
            raise CheckpointError(
                f"PEFT cannot attach the adapter in {folder.path} to the model: {type(error).__name__}: {error}"
            ) from error
    config.base_model_name_or_path = config.base_model_name_or_path or name
    return adapted


def _take_scales(model: peft.PeftModel, adapter: str, config: peft.LoraConfig) -> None:
    """Give an adapter that was there the folder's ranks and scales, which may be others, or said otherwise."""
    settings = config.to_dict()
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "inference_mode")
    _set(model.peft_config[adapter], {name: settings[name] for name in names})
    for path, module in lora_layers(model, adapter):
        rank, scaling = module.r[adapter], scaling_of(settings, path)
        module.scaling[adapter] = scaling
        module.lora_alpha[adapter] = scaling * (math.sqrt(rank) if settings["use_rslora"] else rank)
        if isinstance(getattr(module, "use_rslora", None), dict):
            module.use_rslora[adapter] = settings["use_rslora"]


def _config_on_disk(model: peft.PeftModel, adapter: str) -> peft.LoraConfig:
    """The adapter's settings as others should read them: the scales that its layers have, by the plain rule."""
    base: Any = model.get_base_model()
    config: Any = copy.copy(model.peft_config[adapter])
    config.inference_mode = True
    if isinstance(config.target_modules, (set, list)):
        # Where PEFT was given a compiled model, torch.compile's names: they would match nothing in a plain one.
        config.target_modules = sorted({name.replace("_orig_mod.", "") for name in config.target_modules})
    config.base_model_name_or_path = config.base_model_name_or_path or base.__dict__.get("name_or_path") or None
    if config.task_type is None:  # for peft.AutoPeftModel
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    layers = {path: (module.r[adapter], module.scaling[adapter]) for path, module in lora_layers(model, adapter)}
    settings = config.to_dict()
    said = all(math.isclose(scaling_of(settings, path), scaling) for path, (_, scaling) in layers.items())
    if layers and (config.use_rslora or not said):
        _set(config, plain_settings(layers))
    return config


def _set(config: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(config, name, value)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, on the CPU, and each in memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    separate = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        separate[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return separate
