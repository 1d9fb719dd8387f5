"""The rates of this machine's CPU, measured by NumPy in float32."""

import time

import numpy as np

from lora_one.estimate.hardware import Hardware

from .timing import THIN_COLUMNS, Clock, least


def by_numpy(size: int = 1024, clock: Clock = time.perf_counter) -> Hardware:
    """Measure NumPy's float32 products, copies and decompositions.

    Args:
        size: of the square matrices. If they fit into a cache, the rates come out too high.
        clock: in seconds.
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, size, size)).astype(np.float32)
    out, tall = np.empty_like(a), a.reshape(-1, 32)
    small, square = a[:48, :48].copy(), a[: size // 3, : size // 3].copy()
    source, copy = np.ones((2, 64 * size * size // 4), np.float32)
    rows, columns = tall.shape

    def thin_rate(columns: int) -> float:
        thin = b[:, :columns].copy()  # (size, columns)
        return 4 * size * size * columns / least(lambda: (a @ thin, thin.T @ a), clock)

    return Hardware(
        name="this machine's CPU, as NumPy in float32",
        flops=2 * size**3 / least(lambda: np.matmul(a, b, out=out), clock),
        efficiency=1.0,
        bandwidth=2 * source.nbytes / least(lambda: np.copyto(copy, source), clock),
        qr_flops=4 * rows * columns**2 / least(lambda: np.linalg.qr(tall), clock),
        svd_flops=22 * small.shape[0] ** 3 / least(lambda: np.linalg.svd(small), clock),
        dense_svd_flops=22 * square.shape[0] ** 3 / least(lambda: np.linalg.svd(square), clock),
        thin=tuple((k, thin_rate(k)) for k in THIN_COLUMNS),
        first_touch=source.nbytes / least(lambda: np.ones(source.size, np.float32), clock),
    )
