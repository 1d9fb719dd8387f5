"""How fast a machine is: peaks of known accelerators, and a quick measurement of this one."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lora_one.errors import ConfigError

TERA, GIGA = 1e12, 1e9
Clock = Callable[[], float]


@dataclass(frozen=True)
class Hardware:
    """Rates that times are divided by.

    Attributes:
        name: as shown.
        flops: of dense products in the model's dtype, per second, at the peak.
        efficiency: the share of that peak that a training step reaches.
        bandwidth: bytes per second, to and from memory.
        qr_flops, svd_flops: of decompositions of small matrices, per second, as reached.
        memory: bytes there are; None if not known.
    """

    name: str
    flops: float
    efficiency: float
    bandwidth: float
    qr_flops: float
    svd_flops: float
    memory: float | None = None


# Dense peaks from the makers' data sheets: TFLOP/s in bfloat16 and in float32 (without TF32), GB/s, GB.
_PEAKS = {
    "A100": (312.0, 19.5, 2039.0, 80.0),
    "H100": (989.0, 67.0, 3350.0, 80.0),
    "H200": (989.0, 67.0, 4800.0, 141.0),
    "L4": (121.0, 30.3, 300.0, 24.0),
    "RTX4090": (165.2, 82.6, 1008.0, 24.0),
    "M2Max": (13.6, 13.6, 400.0, 96.0),
    "M3Max": (14.2, 14.2, 400.0, 128.0),
    "M4Max": (18.4, 18.4, 546.0, 128.0),
}
ASSUMED_EFFICIENCY = 0.4  # what large training runs report of the peak; not measured here
# Thin QRs and small SVDs are bound by latency and run far below the peak. An assumption too, and a cautious one.
ASSUMED_DECOMPOSITION = 0.005
KNOWN = tuple(_PEAKS)


def known(name: str, dtype: str) -> Hardware:
    """An accelerator of the table.

    Raises:
        ConfigError: one that is not there.
    """
    if name not in _PEAKS:
        raise ConfigError(f"hardware must be one of {', '.join(KNOWN)}, got {name!r}: or give --tflops and --bandwidth")
    half, single, bandwidth, memory = _PEAKS[name]
    flops = TERA * (single if dtype == "float32" else half)
    slow = ASSUMED_DECOMPOSITION * single * TERA
    return Hardware(name, flops, ASSUMED_EFFICIENCY, bandwidth * GIGA, slow, slow, memory * GIGA)


def given(tflops: float, bandwidth: float) -> Hardware:
    """A machine of which two numbers are known: TFLOP/s in the model's dtype, and GB/s."""
    for name, value in (("tflops", tflops), ("bandwidth", bandwidth)):
        if not value > 0:
            raise ConfigError(f"{name} must be > 0, got {value}")
    slow = ASSUMED_DECOMPOSITION * tflops * TERA
    return Hardware("as given", tflops * TERA, ASSUMED_EFFICIENCY, bandwidth * GIGA, slow, slow)


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
    else:
        hardware = measured() if name is None else known(name, dtype)
    if efficiency is None:
        return hardware
    if not 0 < efficiency <= 1:
        raise ConfigError(f"efficiency must be in (0, 1], got {efficiency}")
    return replace(hardware, efficiency=efficiency)


def measured(size: int = 1024, clock: Clock = time.perf_counter) -> Hardware:
    """This machine's CPU by NumPy's float32 products, copies and decompositions: about a second.

    Args:
        size: of the square matrices; what fits a cache flatters the machine.
        clock: in seconds.
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, size, size)).astype(np.float32)
    out, thin, square = np.empty_like(a), a.reshape(-1, 32), a[: size // 4, : size // 4].copy()
    source, copy = np.ones((2, 64 * size * size // 4), np.float32)
    rows, columns = thin.shape
    return Hardware(
        name="this machine's CPU, as NumPy in float32",
        flops=2 * size**3 / _least(lambda: np.matmul(a, b, out=out), clock),
        efficiency=1.0,
        bandwidth=2 * source.nbytes / _least(lambda: np.copyto(copy, source), clock),
        qr_flops=4 * rows * columns**2 / _least(lambda: np.linalg.qr(thin), clock),
        svd_flops=22 * (size // 4) ** 3 / _least(lambda: np.linalg.svd(square), clock),
    )


def _least(run: Callable[[], object], clock: Clock, repeats: int = 3) -> float:
    """Seconds of a call, after one that warms up: the least, since what else the machine does only adds to it."""
    times = []
    for _ in range(repeats + 1):
        began = clock()
        run()
        times.append(clock() - began)
    return min(times[1:])
