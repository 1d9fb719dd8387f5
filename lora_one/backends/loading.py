"""Which frameworks there are, and which of them a model belongs to. Imports none of them until asked to."""

import importlib
import sys
from typing import TYPE_CHECKING, Any, cast

from lora_one.errors import BackendError

from .interface import Backend

if TYPE_CHECKING:  # so that each is held to the protocol
    from . import jax, mlx, torch

    _torch: Backend = torch
    _jax: Backend = jax
    _mlx: Backend = mlx

# name -> (module, the packages whose classes announce it). NumPy has arrays only, so no model announces it.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "numpy": ("lora_one.backends.numpy", ()),
    "torch": ("lora_one.backends.torch", ("torch",)),
    "jax": ("lora_one.backends.jax", ("flax",)),
    "mlx": ("lora_one.backends.mlx", ("mlx", "mlx_lm")),
}


def load_backend(name: str) -> Backend:
    """Import a backend's module, and with it its framework. NumPy's has `ops` alone.

    Raises:
        BackendError: no such backend, or its framework is not installed.
    """
    _check_name(name)
    try:
        return cast(Backend, importlib.import_module(BACKENDS[name][0]))
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "lora_one":
            raise
        raise BackendError(
            f"backend {name!r} needs the package {error.name!r}: pip install 'lora-one[{name}]'"
        ) from error


def backend_of(model: Any, backend: str | None = None) -> Backend:
    """The backend of a model, read off the packages that its classes come from.

    Args:
        backend: the name the caller expects, checked against the model.

    Raises:
        BackendError: the model belongs to no backend, or not to the one named.
    """
    packages = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    found = [name for name, (_, roots) in BACKENDS.items() if packages.intersection(roots)]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if backend is not None:
        _check_name(backend)
    if not found:
        models = [name for name, (_, roots) in BACKENDS.items() if roots]
        raise BackendError(
            f"model must be of one of the frameworks {', '.join(models)}, got {kind}{_pytree_hint(model)}"
        )
    if backend is not None and backend not in found:
        raise BackendError(f"backend {backend!r} does not fit the model: {kind} belongs to {found[0]!r}")
    return load_backend(found[0])


def _pytree_hint(model: Any) -> str:
    """How parameters in a pytree are handed in, if the model is one: a dict, an Equinox module, a dataclass of JAX."""
    jax = sys.modules.get("jax")
    is_tree = isinstance(model, (dict, list, tuple)) if jax is None else not jax.tree_util.all_leaves([model])
    if model is None or not is_tree:
        return ""
    return (
        ". It is a pytree: parameters for JAX, an Equinox module for instance, go in as "
        "lora_one.backends.jax.PytreeModel(params), and a Linen module with its variables as "
        "LinenModel(module, variables), see docs/jax.md"
    )


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
