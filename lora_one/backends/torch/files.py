"""Adapters of PyTorch models on disk, written and read by PEFT after our own checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_one.checkpoint import PEFT_BASE_KEY, WEIGHTS, AdapterFolder, check_folder, read_folder
from lora_one.errors import CheckpointError, ModelError

from .adapters import adapter_of, is_leftover, mark_as_ours, take_out_leftover
from .attach import find_sites
from .snapshot import Snapshot
from .starts import base_weights_kept, check_start
from .wrappers import plain_names, unwrapped


def save(model: nn.Module, path: Path) -> None:
    """See `lora_one.save`."""
    with _opened(model, "save") as adapted:
        for config in adapted.peft_config.values():
            # Where PEFT was given a compiled model, torch.compile's names: they would match nothing in a plain one.
            if isinstance(config.target_modules, (set, list)):
                config.target_modules = {name.replace("_orig_mod.", "") for name in config.target_modules}
        # PEFT would add a copy of the base weight where LoRA is on the output layer; it is never changed here.
        adapted.save_pretrained(str(path), save_embedding_layers=False)


def merge(model: nn.Module) -> nn.Module:
    """See `lora_one.merge`."""
    with _opened(model, "merge") as adapted:
        merged: Any = adapted.base_model.merge_and_unload()
    vars(merged).pop("peft_config", None)  # PEFT before 0.21 leaves it
    if hasattr(merged, "_hf_peft_config_loaded"):  # of transformers' add_adapter
        merged._hf_peft_config_loaded = False
    return merged


def load(model: nn.Module, path: Path, trainable: bool) -> nn.Module:
    """See `lora_one.load`."""
    base = unwrapped(model)
    with plain_names(base):
        adapted = adapter_of(base)
        present = None if is_leftover(base, adapted) else adapted  # what the folder's factors go into
        folder = _without_base_weights(read_folder(path), base if adapted is None else adapted)
        problems = check_folder(folder, _linear_layers(base)) + check_start(folder, present)
        if present is not None and not problems:
            problems = _missing(present, folder)
        if problems:
            raise CheckpointError(f"the adapter in {path} does not fit the model", problems)
        if present is None:
            return _attach(base, folder, trainable)
        name = present.active_adapters[0]
        peft.set_peft_model_state_dict(present, peft.load_peft_weights(str(path), device="cpu"), name)
        return model


def _attach(model: nn.Module, folder: AdapterFolder, trainable: bool) -> peft.PeftModel:
    found = Snapshot(model)
    with base_weights_kept(model, folder):
        try:
            take_out_leftover(model)
            with torch.random.fork_rng(devices=[]):  # PEFT draws a start before it reads the file
                adapted = _opened_by_peft(model, folder, trainable)
            problems = _missing(adapted, folder)
            if problems:
                raise CheckpointError(f"the adapter in {folder.path} does not fit the model", problems)
        except BaseException:
            found.restore()
            raise
    found.restore_modes(adapted)
    mark_as_ours(adapted)
    return adapted


def _opened_by_peft(model: nn.Module, folder: AdapterFolder, trainable: bool) -> peft.PeftModel:
    try:
        return peft.PeftModel.from_pretrained(model, str(folder.path), is_trainable=trainable)
    except Exception as error:  # of whatever kind: what its configuration asks for is not ours
        raise CheckpointError(
            f"PEFT cannot attach the adapter in {folder.path} to the model: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _opened(model: nn.Module, verb: str) -> Iterator[peft.PeftModel]:
    """The adapter of a model, with the names that it has in the plain model."""
    inner = unwrapped(model)
    with plain_names(inner):
        adapted = adapter_of(inner)
        if adapted is None:
            raise ModelError(
                f"{verb} needs a model with LoRA layers, as lora_one.init returns it, got {type(inner).__name__} "
                "without any"
            )
        yield adapted


def _missing(model: peft.PeftModel, folder: AdapterFolder) -> list[str]:
    """What the model has and the folder has not, or has with another rank, and modules that only one of them keeps."""
    problems = []
    for site in find_sites(model):
        name = site.layer.name
        if name not in folder.lora_A:
            problems.append(f"{name}: the model has LoRA here, the file has none")
        elif site.layer.rank != folder.lora_A[name][0]:
            problems.append(f"{name}: the model has rank {site.layer.rank}, the file {folder.lora_A[name][0]}")
    # PEFT passes over what only one side has: a trained head would be lost without a word.
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    kept = {key for key in state if ".lora_" not in key}
    problems += [f"{key}: the model keeps it whole, the file has none" for key in sorted(kept - set(folder.others))]
    problems += [
        f"{key}: the file has it, the model has no such module to save" for key in folder.others if key not in kept
    ]
    return problems


def _without_base_weights(folder: AdapterFolder, model: nn.Module) -> AdapterFolder:
    """PEFT saves the base weight with LoRA on an output layer. It says nothing where it is the model's own."""
    names = {PEFT_BASE_KEY.format(path=layer): f"{layer}.weight" for layer in folder.lora_A}
    copies = names.keys() & set(folder.others)
    if not copies:
        return folder
    weights, same = model.state_dict(), set()
    with safe_open(folder.path / WEIGHTS, framework="pt") as file:
        for key in copies:
            weight = weights.get(key if isinstance(model, peft.PeftModel) else names[key])
            if weight is not None and torch.equal(file.get_tensor(key).to(weight), weight):
                same.add(key)
    return replace(folder, others=[key for key in folder.others if key not in same])


def _linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """name -> (out, in), names as in the base model."""
    base: Any = model.base_model.model if isinstance(model, peft.PeftModel) else model
    shapes = {}
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, LoraLayer)):
            shapes[name] = (int(module.out_features), int(module.in_features))
        elif isinstance(module, Conv1D):
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
    return shapes
