"""Imports that may fail, hang or crash: `lora-one doctor` runs this file in a separate process per framework.

    python -P probe.py torch transformers peft

imports the named modules, asks the framework among them for its devices, and prints one line of JSON. It uses the
standard library only, so that nothing else can fail.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """The result of `probe`.

    Attributes:
        errors: module -> the error that its import raised.
        devices: of the framework, the best one first; empty if it could not be imported.
    """

    errors: dict[str, str]
    devices: list[str]


def torch_devices() -> list[str]:
    torch: Any = importlib.import_module("torch")
    devices = [f"cuda: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps: Apple GPU")
    if not devices and torch.version.cuda:
        return [f"cpu (built for CUDA {torch.version.cuda}, which finds no GPU here)"]
    return [*devices, "cpu"]


def jax_devices() -> list[str]:
    jax: Any = importlib.import_module("jax")
    return [device.platform + f": {device.device_kind}" * (device.platform != "cpu") for device in jax.devices()]


def mlx_devices() -> list[str]:
    mx: Any = importlib.import_module("mlx.core")
    return [*(["gpu"] if mx.is_available(mx.gpu) else []), "cpu"]


DEVICES: dict[str, Callable[[], list[str]]] = {"torch": torch_devices, "jax": jax_devices, "mlx.core": mlx_devices}


def probe(modules: list[str]) -> Answer:
    """Import the modules, and ask the framework among them for its devices."""
    errors: dict[str, str] = {}
    devices: list[str] = []
    for module in modules:
        try:
            importlib.import_module(module)
            if module in DEVICES:
                devices = DEVICES[module]()
        except (Exception, SystemExit) as error:
            errors[module] = f"{type(error).__name__}: {error}"
    return Answer(errors, devices)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX reserves most of the GPU
    stdout = sys.stdout
    sys.stdout = sys.stderr  # where libraries may print on import
    print(json.dumps(probe(sys.argv[1:])._asdict()), file=stdout)
