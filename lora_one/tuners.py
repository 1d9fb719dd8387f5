"""The frameworks whose models the command fine-tunes."""

import importlib
import importlib.util
from types import ModuleType

from .backends import load_backend
from .errors import BackendError


def load_tuner(name: str) -> ModuleType:
    """The backend's module that fine-tunes causal language models: see `lora_one.tuner.Tuner`.

    Raises:
        BackendError: as `load_backend`, or a backend that has arrays only.
    """
    backend = load_backend(name)
    module = f"{backend.__name__}.tuner"
    if importlib.util.find_spec(module) is None:
        raise BackendError(f"backend {name!r} has no models to fine-tune, only arrays")
    return importlib.import_module(module)
