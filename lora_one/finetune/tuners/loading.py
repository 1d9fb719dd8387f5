"""The frameworks whose models the command fine-tunes."""

import importlib
import importlib.util
from types import ModuleType

from lora_one.backends import load_backend
from lora_one.errors import BackendError


def load_tuner(name: str) -> ModuleType:
    """The backend's module that fine-tunes causal language models: see `lora_one.finetune.tuners.interface.Tuner`.

    Raises:
        BackendError: as `load_backend`, or a backend that has arrays only.
    """
    load_backend(name)
    module = f"lora_one.finetune.tuners.{name}"
    if importlib.util.find_spec(module) is None:
        raise BackendError(f"backend {name!r} has no models to fine-tune, only arrays")
    return importlib.import_module(module)
