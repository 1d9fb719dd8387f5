"""What `lora-one doctor` runs in a process of its own, one a framework: imports that may fail, hang or crash.

    python -P probe.py torch transformers peft

imports the modules that are named, asks the framework among them for its devices, and prints one line of JSON.
Uses the standard library alone, so that nothing else can be what fails.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def torch_devices() -> list[str]:
    torch: Any = importlib.import_module("torch")
    found = [f"cuda: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps: Apple GPU")
    if not found and torch.version.cuda:
        return [f"cpu (built for CUDA {torch.version.cuda}, which finds no GPU here)"]
    return [*found, "cpu"]


def jax_devices() -> list[str]:
    jax: Any = importlib.import_module("jax")
    return [device.platform + f": {device.device_kind}" * (device.platform != "cpu") for device in jax.devices()]


def mlx_devices() -> list[str]:
    mx: Any = importlib.import_module("mlx.core")
    return [*(["gpu"] if mx.is_available(mx.gpu) else []), "cpu"]


DEVICES: dict[str, Callable[[], list[str]]] = {"torch": torch_devices, "jax": jax_devices, "mlx.core": mlx_devices}


def probe(modules: list[str]) -> dict[str, Any]:
    """What importing the modules raises, by module, and the devices of the framework, if it could be imported."""
    errors: dict[str, str] = {}
    devices: list[str] = []
    for module in modules:
        try:
            importlib.import_module(module)
            if module in DEVICES:
                devices = DEVICES[module]()
        except (Exception, SystemExit) as error:
            errors[module] = f"{type(error).__name__}: {error}"
    return {"errors": errors, "devices": devices}


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of the GPU for this question
    answer = sys.stdout
    sys.stdout = sys.stderr  # libraries that greet do it elsewhere
    found = probe(sys.argv[1:])
    print(json.dumps(found), file=answer)
