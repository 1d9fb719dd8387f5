"""The parameters that a JAX model trains whole, with the names and axes that they have in an adapter folder.

A folder has PyTorch's names. A parameter keeps its own name where PyTorch's belongs to another one of its module.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lora_one.checkpoint.tensors import STORED_NAMES, Tensor
from lora_one.checkpoint.whole import Shape

from .nnx import whole as of_nnx
from .placement import kernel_sharding, put, replicated
from .trees import whole as of_trees
from .trees.models import LinenModel, PytreeModel

_IN_TORCH = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


def torch_names(paths: Iterable[str]) -> dict[str, str]:
    """Return path in the model -> path in the folder, for all parameters of a model.

    >>> torch_names(["embed.embedding", "head.bias", "head.kernel", "odd.kernel", "odd.scale"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'embed.embedding': 'embed.weight', 'head.bias': 'head.bias', 'head.kernel': 'head.weight',
     'odd.kernel': 'odd.weight', 'odd.scale': 'odd.scale'}
    """
    names = {path: path for path in paths}
    taken = set(names)
    for path in names:
        module, _, name = path.rpartition(".")
        renamed = f"{module}.{_IN_TORCH.get(name, name)}"
        if renamed not in taken:
            names[path] = renamed
            taken.add(renamed)
    return names


def shapes_in_torch(model: Any) -> dict[str, Shape | str]:
    """Return the shape of every parameter by its name in a folder, or why it cannot be trained whole."""
    if isinstance(model, nnx.Module):
        variables = of_nnx.parameters(model)
        reasons = {path: reason for path, variable in variables.items() if (reason := of_nnx.refusal(variable))}
        arrays = {path: variable.get_raw_value() for path, variable in variables.items()}
    else:
        arrays, reasons = of_trees.parameters(_tree(model)), {}
    names = torch_names(arrays)
    shapes: dict[str, Shape | str] = {}
    for path, array in arrays.items():
        reason = reasons.get(path)
        shapes[names[path]] = _to_torch(path, np.broadcast_to(0, array.shape)).shape if reason is None else reason
    return shapes


def whole_arrays(model: Any) -> dict[str, Any]:
    """Return the parameters that are trained whole, by path in the model."""
    if isinstance(model, nnx.Module):
        return {path: variable.get_raw_value() for path, variable in of_nnx.whole_parameters(model).items()}
    return of_trees.by_path(of_trees.whole_entries(model.lora, (weight.layer for weight in model.layouts)))


def whole_tensors(model: Any) -> dict[str, Tensor]:
    """Return the parameters that are trained whole, by name in a folder. Every process must call it."""
    names = _all_names(model)
    return {names[path]: _to_numpy(path, array) for path, array in whole_arrays(model).items()}


def whole_names(model: Any) -> set[str]:
    """Return the names in a folder of the parameters that are trained whole."""
    names = _all_names(model)
    return {names[path] for path in whole_arrays(model)}


def from_folder(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return the parameters of a folder by path in the model, with the dtypes and the places of the model's own."""
    if isinstance(model, nnx.Module):
        own = {path: variable.get_raw_value() for path, variable in of_nnx.parameters(model).items()}
    else:
        own = of_trees.parameters(_tree(model))
    names = torch_names(own)
    return {
        path: put(
            jnp.asarray(np.ascontiguousarray(_from_torch(path, tensors[names[path]].array)), array.dtype),
            kernel_sharding(array),
        )
        for path, array in own.items()
        if names[path] in tensors
    }


def _tree(model: LinenModel | PytreeModel) -> Any:
    return model.variables["params"] if isinstance(model, LinenModel) else model.params


def _all_names(model: Any) -> dict[str, str]:
    own = of_nnx.parameters(model) if isinstance(model, nnx.Module) else of_trees.parameters(_tree(model))
    return torch_names(own)


def _to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """Return a kernel, (..., in, out), in PyTorch's order of axes, (out, in, ...)."""
    return np.moveaxis(array, (-1, -2), (0, 1)) if _is_kernel(path, array) else array


def _from_torch(path: str, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (0, 1), (-1, -2)) if _is_kernel(path, array) else array


def _is_kernel(path: str, array: np.ndarray) -> bool:
    return path.rpartition(".")[2] == "kernel" and array.ndim >= 2


def _to_numpy(path: str, array: Any) -> Tensor:
    wide = np.float64 if array.dtype == jnp.float64 else np.float32  # NumPy has no bfloat16
    whole = np.asarray(put(array, replicated(kernel_sharding(array))), wide)
    return Tensor(_to_torch(path, whole), STORED_NAMES[array.dtype.name])
