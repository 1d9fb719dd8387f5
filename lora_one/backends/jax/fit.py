"""Checks that an adapter folder belongs to a JAX model, before anything is attached."""

from typing import Any

from lora_one.backends.interface import Layer
from lora_one.checkpoint.peft import AdapterFolder, check_folder
from lora_one.checkpoint.plain_lora import setting_problems

from .forms import forms_of
from .sites import Site
from .whole import shapes_in_torch, whole_names


def fit_problems(model: Any, folder: AdapterFolder, sites: dict[str, Site], has_lora: bool) -> list[str]:
    """Return everything that keeps the folder's factors and whole modules from going to a model.

    Args:
        model: the model.
        folder: the adapter.
        sites: the sites of the model.
        has_lora: whether the sites have LoRA already, whose rank must be the folder's.
    """
    stacks = {name: site.layers() for name, site in sites.items()}
    layers = [layer for stack in stacks.values() for layer in stack]
    shapes = {layer.name: (layer.out_features, layer.in_features) for layer in layers}
    held = whole_names(model) if has_lora else None
    problems = setting_problems(folder.config, allowed=("modules_to_save",))
    problems += check_folder(folder, shapes, shapes_in_torch(model), held, forms_of(model, sites.values()))
    problems = problems or _stack_problems(folder, stacks)
    if has_lora and not problems:
        problems = [
            f"{layer.name}: the model has rank {layer.rank}, the file {_rank(folder, layer) or 'none'}"
            for layer in layers
            if _rank(folder, layer) != layer.rank
        ]
    return problems


def _stack_problems(folder: AdapterFolder, stacks: dict[str, list[Layer]]) -> list[str]:
    problems = []
    for name, layers in stacks.items():
        ranks = {_rank(folder, layer) for layer in layers}
        if len(ranks) > 1:
            problems.append(
                f"{name}: its {len(layers)} stacked layers must have one rank, got {sorted(map(str, ranks))}"
            )
    return problems


def _rank(folder: AdapterFolder, layer: Layer) -> int | None:
    """Return the rank of a layer's factors in the folder; None if it has none."""
    return folder.lora_A[layer.name][0] if layer.name in folder.lora_A else None
