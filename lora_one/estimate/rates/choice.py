"""Which machine the times are for: one of the table, one that is given, or this one, measured."""

import importlib
import importlib.util
import time
from dataclasses import replace

from lora_one.errors import ConfigError
from lora_one.estimate.hardware import Hardware, given, known

from .numpy import by_numpy
from .timing import Clock


def choose(
    name: str | None, tflops: float | None, bandwidth: float | None, efficiency: float | None, dtype: str
) -> Hardware:
    """By name, by its two numbers, or with neither this machine, measured.

    Raises:
        ConfigError: a name that is not known, one number without the other, or both ways at once.
    """
    if (tflops is None) != (bandwidth is None) or (name is not None and tflops is not None):
        raise ConfigError("give either hardware, or both tflops and bandwidth, or none of them")
    if tflops is not None and bandwidth is not None:
        hardware = given(tflops, bandwidth)
    elif name is not None:
        hardware = known(name, dtype)
    else:
        hardware = measured(dtype)
    if efficiency is None:
        return hardware
    if not 0 < efficiency <= 1:
        raise ConfigError(f"efficiency must be in (0, 1], got {efficiency}")
    return replace(hardware, efficiency=efficiency)


def measured(dtype: str, clock: Clock = time.perf_counter) -> Hardware:
    """By PyTorch in that dtype where the torch extra is installed, or else by NumPy in float32."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")):
        return by_numpy(clock=clock)
    found: Hardware = importlib.import_module("lora_one.estimate.rates.torch").by_torch(dtype, clock=clock)
    return found
