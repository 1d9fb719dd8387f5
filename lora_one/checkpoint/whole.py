"""Modules that are trained whole beside the LoRA layers, PEFT's `modules_to_save`: their parameters in a folder.

A parameter is named by its path in the base model, and has PyTorch's order of axes: a linear layer's weight is
(out, in), a convolution's is (out, in, ...).
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

PREFIX = "base_model.model."

Shape = tuple[int, ...]


def ends_with_a_name(path: str, names: Iterable[str]) -> bool:
    """Return whether a name means the module at a path, by PEFT's rule: "norm" means "layer_norm" too."""
    return path.endswith(tuple(names))


def is_within(path: str, modules: Iterable[str]) -> bool:
    """Return whether a path is that of one of the modules, or below it."""
    return any(f"{path}.".startswith(f"{module}.") for module in modules)


def whole_module(parameter: str, names: Collection[str]) -> str | None:
    """Return the outermost module on a parameter's path that a name of `modules_to_save` means; None for no module."""
    parts = parameter.split(".")
    modules = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((module for module in modules if ends_with_a_name(module, names)), None)


def whole_in_file(config: Mapping[str, Any], others: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the parameters that were trained whole, path -> shape, of the tensors that are no LoRA factors."""
    names = config.get("modules_to_save") or ()
    paths = {key.removeprefix(PREFIX): shape for key, shape in others.items() if key.startswith(PREFIX)}
    return {path: shape for path, shape in paths.items() if ".lora_" not in path and whole_module(path, names)}


def whole_modules(parameters: Iterable[str], names: Collection[str]) -> tuple[str, ...]:
    """Return the paths of the modules that these parameters belong to, in order."""
    modules = (whole_module(path, names) for path in sorted(parameters))
    return tuple(dict.fromkeys(module for module in modules if module is not None))


def whole_problems(
    in_file: Mapping[str, Shape],
    modules: Iterable[str],
    in_model: Mapping[str, Shape | str],
    held: Collection[str] | None = None,
) -> list[str]:
    """Return all reasons why the parameters of a folder cannot go to a model, one sentence each.

    Args:
        in_file: the folder's parameters.
        modules: the paths of the modules that they belong to.
        in_model: all of the model's parameters: path -> shape, or the reason why it cannot be trained whole.
        held: the parameters that the model trains whole already; None for a model without LoRA.
    """
    problems = []
    for path, shape in in_file.items():
        own = in_model.get(path)
        if own is None:
            problems.append(f"{path}: the file has it trained whole, the model has no such parameter")
        elif isinstance(own, str):
            problems.append(f"{path}: {own}")
        elif own != shape:
            problems.append(f"{path}: must be {own}, got {shape}")
        elif held is not None and path not in held:
            problems.append(f"{path}: the file has it trained whole, the model has no such module to save")
    modules = tuple(modules)
    expected = {path for path in in_model if is_within(path, modules)} if held is None else set(held)
    missing = sorted(expected - in_file.keys())
    return problems + [f"{path}: the model keeps it whole, the file has none" for path in missing]


def channels_last(path: str, array: np.ndarray) -> np.ndarray:
    """Return a parameter in MLX's order of axes: a convolution's weight is (out, ..., in)."""
    return np.moveaxis(array, 1, -1) if _is_of_convolution(path, array) else array


def channels_first(path: str, array: np.ndarray) -> np.ndarray:
    """Return a parameter of MLX in PyTorch's order of axes: the inverse of `channels_last`."""
    return np.moveaxis(array, -1, 1) if _is_of_convolution(path, array) else array


def _is_of_convolution(path: str, array: np.ndarray) -> bool:
    return path.rpartition(".")[2] == "weight" and array.ndim >= 3
