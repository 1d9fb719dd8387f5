"""Adapters of PyTorch models on disk, written and read by PEFT after our own checks."""

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

from .attach import find_sites
from .snapshot import Snapshot


def save(model: nn.Module, path: Path) -> None:
    """See `lora_one.save`."""
    # PEFT would add a copy of the base weight where LoRA is on the output layer; the base weight is never changed here.
    _require_adapter(model, "save").save_pretrained(str(path), save_embedding_layers=False)


def merge(model: nn.Module) -> nn.Module:
    """See `lora_one.merge`."""
    merged: Any = _require_adapter(model, "merge").base_model.merge_and_unload()
    return merged


def load(model: nn.Module, path: Path, trainable: bool) -> peft.PeftModel:
    """See `lora_one.load`."""
    folder = _without_base_weights(read_folder(path), model)
    problems = check_folder(folder, _linear_layers(model))
    if isinstance(model, peft.PeftModel) and not problems:
        problems = _missing(model, folder)
    if problems:
        raise CheckpointError(f"the adapter in {path} does not fit the model", problems)
    if isinstance(model, peft.PeftModel):
        adapter = model.active_adapters[0]
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(path), device="cpu"), adapter)
        return model
    found = Snapshot(model)
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws a start before it reads the file
            adapted = peft.PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
        problems = _missing(adapted, folder)
        if problems:
            raise CheckpointError(f"the adapter in {path} does not fit the model", problems)
    except BaseException:
        found.restore()
        raise
    found.restore_modes(adapted)
    return adapted


def _require_adapter(model: nn.Module, verb: str) -> peft.PeftModel:
    if not isinstance(model, peft.PeftModel):
        raise ModelError(
            f"{verb} needs a model with LoRA layers, as lora_one.init returns it, got {type(model).__name__}"
        )
    return model


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
