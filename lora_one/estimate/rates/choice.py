"""The machine that times are estimated for: a known one, a described one, or this one, measured."""

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
    """Return the machine of that name, the one with these two numbers, or, without either, this machine, measured.

    Args:
        name: "H100", ...
        tflops: peak in the dtype, TFLOP/s.
        bandwidth: of memory, GB/s.
        efficiency: the share of the peaks that a training step reaches, in (0, 1]; None for the machine's own.

    Raises:
        ConfigError: the name is unknown, one number is given without the other, or a name is given with numbers.
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
    """Measure this machine: by PyTorch in that dtype if the torch extra is installed, else by NumPy in float32.

    Args:
        clock: in seconds.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")):
        return by_numpy(clock=clock)
    from .torch import by_torch

    return by_torch(dtype, clock=clock)
