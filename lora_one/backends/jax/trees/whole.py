"""Parameters of a Linen model or of a pytree that are trained whole beside LoRA: `Config.modules_to_save`.

They are copied into the model's `lora`, by the path of their module, and take the places of the model's own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_one.backends.jax.passes.batches import is_array
from lora_one.backends.jax.sites import dotted
from lora_one.backends.targets import modules_named
from lora_one.checkpoint.whole import is_within
from lora_one.checks import shown_names
from lora_one.errors import ModelError

Entries = dict[str, dict[str, Any]]  # path of a module -> name of its own parameter -> the array


def parameters(params: Any) -> dict[str, Any]:
    """Return the arrays in a tree of parameters, or their shapes, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {dotted(path): leaf for path, leaf in leaves if is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)}


def find_whole(params: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the parameters, by path, of the modules that the names mean: of the branches of the tree.

    Raises:
        ModelError: a name that the tree does not have, or a module with a parameter that is not floating.
    """
    leaves = parameters(params)
    parts = [path.split(".") for path in leaves]
    modules = dict.fromkeys(".".join(path[:depth]) for path in parts for depth in range(1, len(path)))
    chosen = modules_named(names, modules)
    found = {path: leaf for path, leaf in leaves.items() if is_within(path, chosen)}
    wrong = [f"{path} is {leaf.dtype}" for path, leaf in found.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)]
    if wrong:
        raise ModelError(
            f"modules_to_save must name modules with floating parameters, got {tuple(names)}, where "
            f"{shown_names(wrong)}"
        )
    return found


def as_entries(arrays: Mapping[str, Any]) -> Entries:
    """Return parameters by path as entries of a model's `lora`."""
    entries: Entries = {}
    for path, array in arrays.items():
        module, _, name = path.rpartition(".")
        entries.setdefault(module, {})[name] = array
    return entries


def whole_entries(lora: Mapping[str, dict[str, Any]], adapted: Iterable[str]) -> Entries:
    """Return the entries of a model's `lora` that are not factors of the adapted layers."""
    factors = set(adapted)
    return {module: dict(arrays) for module, arrays in lora.items() if module not in factors}


def by_path(entries: Entries) -> dict[str, Any]:
    """Return the inverse of `as_entries`."""
    return {f"{module}.{name}": array for module, arrays in entries.items() for name, array in arrays.items()}
