"""This machine's CPU, measured in a second or two: by PyTorch in the model's dtype, or by NumPy in float32."""

import importlib
import importlib.util
import time
from collections.abc import Callable

import numpy as np

from .hardware import Hardware

Clock = Callable[[], float]
THIN_COLUMNS = (4, 8, 12, 16, 32, 64)


def measured(dtype: str, clock: Clock = time.perf_counter) -> Hardware:
    """By PyTorch in that dtype where the torch extra is installed, or else by NumPy in float32."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")):
        return by_numpy(clock=clock)
    return by_torch(dtype, clock=clock)


def by_numpy(size: int = 1024, clock: Clock = time.perf_counter) -> Hardware:
    """NumPy's float32 products, copies and decompositions.

    Args:
        size: of the square matrices; what fits a cache flatters the machine.
        clock: in seconds.
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, size, size)).astype(np.float32)
    out, thin = np.empty_like(a), a.reshape(-1, 32)
    small, square = a[:48, :48].copy(), a[: size // 3, : size // 3].copy()
    source, copy = np.ones((2, 64 * size * size // 4), np.float32)
    rows, columns = thin.shape

    def thin_rate(columns: int) -> float:
        few = b[:, :columns].copy()  # (size, columns)
        return 4 * size * size * columns / least(lambda: (a @ few, few.T @ a), clock)

    return Hardware(
        name="this machine's CPU, as NumPy in float32",
        flops=2 * size**3 / least(lambda: np.matmul(a, b, out=out), clock),
        efficiency=1.0,
        bandwidth=2 * source.nbytes / least(lambda: np.copyto(copy, source), clock),
        qr_flops=4 * rows * columns**2 / least(lambda: np.linalg.qr(thin), clock),
        svd_flops=22 * small.shape[0] ** 3 / least(lambda: np.linalg.svd(small), clock),
        dense_svd_flops=22 * square.shape[0] ** 3 / least(lambda: np.linalg.svd(square), clock),
        thin=tuple((k, thin_rate(k)) for k in THIN_COLUMNS),
        first_touch=source.nbytes / least(lambda: np.ones(source.size, np.float32), clock),
        heap=True,
    )


def by_torch(dtype: str, size: int = 1024, clock: Clock = time.perf_counter) -> Hardware:
    """See `lora_one.backends.torch.rates.rates`."""
    found: Hardware = importlib.import_module("lora_one.backends.torch.rates").rates(dtype, size, clock)
    return found


def least(run: Callable[[], object], clock: Clock, repeats: int = 3) -> float:
    """Seconds of a call, after one that warms up: the least, since what else the machine does only adds to it."""
    times = []
    for _ in range(repeats + 1):
        began = clock()
        run()
        times.append(clock() - began)
    return min(times[1:])
