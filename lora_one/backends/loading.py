"""The table of backends, and which of them a model belongs to. No framework is imported before it is asked for."""

import importlib
import sys
from typing import TYPE_CHECKING, Any, cast

from lora_one.errors import BackendError

from .interface import Backend

if TYPE_CHECKING:  # mypy checks each module against the protocol
    from . import jax, mlx, torch

    _torch: Backend = torch
    _jax: Backend = jax
    _mlx: Backend = mlx

# name -> (module, packages whose classes show that a model is the backend's). NumPy has arrays only, and no models.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "numpy": ("lora_one.backends.numpy", ()),
    "torch": ("lora_one.backends.torch", ("torch",)),
    "jax": ("lora_one.backends.jax", ("flax",)),
    "mlx": ("lora_one.backends.mlx", ("mlx", "mlx_lm")),
}


def load_backend(name: str) -> Backend:
    """Import the module of a backend, and with it its framework.

    Use it to get at a framework's functions when the backend's name comes from a setting. Code that has a model needs
    no name: `backend_of` finds the backend. The functions in `lora_one` do that on their own.

    Args:
        name: "torch", "jax", "mlx" or "numpy". NumPy's backend has `ops` only, since NumPy has no models.

    Returns:
        The module, see `lora_one.backends.interface.Backend`.

    Raises:
        BackendError: there is no such backend, or its framework is not installed.

    >>> load_backend("numpy").ops.name
    'numpy'
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
    """Return the backend that a model belongs to.

    The packages of the model's classes decide, so a subclass of `torch.nn.Module` in your own package is a PyTorch
    model. Use it in code that works with models of any framework.

    Args:
        model: a `torch.nn.Module`, a `flax.nnx.Module`, a wrapped Linen module or pytree, or an `mlx.nn.Module`.
        backend: the name of the backend that you expect, or None. It is checked, and cannot change the result.

    Returns:
        The module, see `lora_one.backends.interface.Backend`.

    Raises:
        BackendError: the model belongs to no backend, or not to the one that is named.

    >>> import torch
    >>> backend_of(torch.nn.Linear(3, 2)).ops.name
    'torch'
    """
    packages = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    names = [name for name, (_, roots) in BACKENDS.items() if packages.intersection(roots)]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if backend is not None:
        _check_name(backend)
    if not names:
        models = [name for name, (_, roots) in BACKENDS.items() if roots]
        raise BackendError(
            f"model must be of one of the frameworks {', '.join(models)}, got {kind}{_pytree_hint(model)}"
        )
    if backend is not None and backend not in names:
        raise BackendError(f"backend {backend!r} does not fit the model: {kind} belongs to {names[0]!r}")
    return load_backend(names[0])


def _pytree_hint(model: Any) -> str:
    """Return how to pass parameters in a pytree (a dict, an Equinox module, a JAX dataclass), if the model is one."""
    jax = sys.modules.get("jax")
    is_tree = isinstance(model, (dict, list, tuple)) if jax is None else not jax.tree_util.all_leaves([model])
    if model is None or not is_tree:
        return ""
    return (
        ". It is a pytree: parameters for JAX, an Equinox module for instance, go in as "
        "lora_one.backends.jax.PytreeModel(params), and a Linen module with its variables as "
        "LinenModel(module, variables), see docs/guide/jax.md"
    )


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise BackendError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
