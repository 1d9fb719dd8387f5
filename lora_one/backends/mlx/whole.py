"""Modules of an MLX model that are trained whole beside the LoRA layers: `Config.modules_to_save`."""

from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from lora_one.backends.targets import modules_named
from lora_one.checkpoint.tensors import STORED_NAMES, Tensor
from lora_one.checkpoint.whole import Shape, channels_first, channels_last, is_within
from lora_one.checks import shown_names
from lora_one.errors import ModelError

from .tree import Place, flat, places

MARK = "is_trained_whole"  # an attribute of the module: a frozen one stays a part of the adapter


def find_whole(model: nn.Module, names: Sequence[str]) -> list[Place]:
    """Return the modules that the names mean.

    Raises:
        ModelError: a name that the model does not have, or a module with parameters that are not floating.
    """
    by_path = {place.path: place for place in places(model)}
    chosen = [by_path[path] for path in modules_named(names, by_path)]
    problems = [
        f"{place.path}.{name} is {_dtype(array)}"
        for place in chosen
        for name, array in flat(place.module.parameters()).items()
        if _dtype(array) not in STORED_NAMES
    ]
    if problems:
        raise ModelError(
            f"modules_to_save must name modules with floating parameters, got {names}, where {shown_names(problems)}: "
            "a quantised module cannot be trained; leave it out when the model is quantised "
            "(quant_predicate of mlx_lm.convert), or dequantise it first"
        )
    return chosen


def train_whole(modules: Iterable[nn.Module], trainable: bool = True) -> None:
    """Make modules a part of the adapter, and unfreeze or freeze them."""
    for module in modules:
        setattr(module, MARK, True)
        (module.unfreeze if trainable else module.freeze)()


def whole_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that are trained whole, by path."""
    return {place.path: place.module for place in places(model) if getattr(place.module, MARK, False)}


def forget_whole(model: nn.Module) -> None:
    """Make the modules that are trained whole ordinary ones, with the values that they have."""
    for module in whole_modules(model).values():
        delattr(module, MARK)


def whole_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return the parameters of the modules that are trained whole, by path."""
    modules = whole_modules(model).items()
    return {f"{path}.{name}": x for path, module in modules for name, x in flat(module.parameters()).items()}


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of the modules that are trained whole, by path, as adapter folders hold them."""
    return {path: _to_numpy(path, array) for path, array in whole_parameters(model).items()}


def fill_whole(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Set the parameters of modules, which keep their dtypes, from those of a folder."""
    for path, module in modules.items():
        own = flat(module.parameters())
        values = {
            name: mx.array(np.ascontiguousarray(channels_last(name, tensors[f"{path}.{name}"].array))).astype(x.dtype)
            for name, x in own.items()
        }
        module.update(tree_unflatten(list(values.items())))


def parameter_shapes(model: nn.Module) -> dict[str, Shape | str]:
    """Return the shape of every parameter in PyTorch's order of axes, or why it cannot be trained whole."""
    shapes: dict[str, Shape | str] = {}
    for path, array in flat(model.parameters()).items():
        is_floating = _dtype(array) in STORED_NAMES
        no_values = np.broadcast_to(0, array.shape)
        shapes[path] = channels_first(path, no_values).shape if is_floating else f"it is {_dtype(array)}, quantised"
    quantised = [path.removesuffix(".scales") for path in shapes if path.endswith(".scales")]
    return {
        path: "its module is quantised in the model" if is_within(path, quantised) else shape
        for path, shape in shapes.items()
    }


def _to_numpy(path: str, array: mx.array) -> Tensor:
    wide = mx.float64 if array.dtype == mx.float64 else mx.float32  # NumPy has no bfloat16
    return Tensor(channels_first(path, np.array(array.astype(wide))), STORED_NAMES[_dtype(array)])


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")
