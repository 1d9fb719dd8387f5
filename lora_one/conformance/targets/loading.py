"""Find the targets that the suite is to run on. A framework's module is imported when it is asked for."""

import importlib
import importlib.util
import os

from lora_one.backends import BACKENDS
from lora_one.conformance.target import Target
from lora_one.errors import BackendError, ConfigError

DTYPES = ("float32", "float64", "bfloat16")
REQUIRED = "LORA_ONE_BACKENDS"  # the environment variable that names backends which must not be left out


def backends(asked: str | None = None) -> list[str]:
    """Return the backends to run: the one asked for, or those that the environment requires, or those installed.

    Raises:
        BackendError: a backend that is asked for, or required by the environment, is not installed.
        ConfigError: there is no backend of that name.
    """
    required = [name.strip() for name in os.environ.get(REQUIRED, "").split(",") if name.strip()]
    wanted = [asked] if asked else required
    unknown = [name for name in wanted if name not in BACKENDS]
    if unknown:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {', '.join(unknown)}")
    missing = [name for name in wanted if not _installed(name)]
    if missing:
        source = "asked for" if asked else f"required by {REQUIRED}"
        raise BackendError(f"{', '.join(missing)}: {source}, not installed: pip install 'lora-one[{missing[0]}]'")
    return wanted or [name for name in BACKENDS if _installed(name)]


def open_target(backend: str, dtype: str, device: str | None = None) -> Target | None:
    """Return a backend on a device in a dtype, or None if the backend or the device lacks the dtype.

    Raises:
        ConfigError: there is no dtype or device of that name.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    module = importlib.import_module(f"{__package__}.{backend}")
    target: Target | None = module.open_target(dtype, device)
    return target


def _installed(backend: str) -> bool:
    return importlib.util.find_spec(backend) is not None  # a backend has the name of its package
