"""The modules of the frameworks whose models the command fine-tunes."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, cast

from lora_one.backends import load_backend
from lora_one.errors import BackendError

from .interface import TunerModule

if TYPE_CHECKING:  # so that mypy checks each of them against the protocol
    from . import jax, mlx, torch

    _torch: TunerModule = torch
    _jax: TunerModule = jax
    _mlx: TunerModule = mlx


def load_tuner(name: str) -> TunerModule:
    """Import the module that fine-tunes the models of a backend.

    Raises:
        BackendError: there is no such backend, its framework is not installed, or it has arrays only.
    """
    load_backend(name)
    module = f"lora_one.finetune.tuners.{name}"
    if importlib.util.find_spec(module) is None:
        raise BackendError(f"backend {name!r} has no models to fine-tune, only arrays")
    return cast(TunerModule, importlib.import_module(module))
