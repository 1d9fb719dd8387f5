"""This machine's CPU, measured in a second or two: by PyTorch in the model's dtype, or by NumPy in float32."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .hardware import Hardware

Clock = Callable[[], float]
TOKENS = 256
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
        return 4 * size * size * columns / _least(lambda: (a @ few, few.T @ a), clock)

    return Hardware(
        name="this machine's CPU, as NumPy in float32",
        flops=2 * size**3 / _least(lambda: np.matmul(a, b, out=out), clock),
        efficiency=1.0,
        bandwidth=2 * source.nbytes / _least(lambda: np.copyto(copy, source), clock),
        qr_flops=4 * rows * columns**2 / _least(lambda: np.linalg.qr(thin), clock),
        svd_flops=22 * small.shape[0] ** 3 / _least(lambda: np.linalg.svd(small), clock),
        dense_svd_flops=22 * square.shape[0] ** 3 / _least(lambda: np.linalg.svd(square), clock),
        thin=tuple((k, thin_rate(k)) for k in THIN_COLUMNS),
        first_touch=source.nbytes / _least(lambda: np.ones(source.size, np.float32), clock),
        heap=True,
    )


def by_torch(dtype: str, size: int = 1024, clock: Clock = time.perf_counter) -> Hardware:
    """PyTorch's products, attention and copies in a dtype, and what is done in float32 anyway.

    Args:
        size: in-features of a layer; it has twice as many out-features.
        clock: in seconds.
    """
    import torch

    from lora_one.backends.torch.frozen_linear import product_of_rows

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.randn(*shape, generator=generator).to(dtype)

    def dense(kind: Any, product: Callable[[Any, Any], Any] = lambda a, b: a @ b.T) -> float:
        """Of a layer in both directions, by a @ b^T."""
        x, w, dy = draw(TOKENS, size, dtype=kind), draw(2 * size, size, dtype=kind), draw(TOKENS, 2 * size, dtype=kind)
        return 8 * TOKENS * size * size / _least(lambda: (product(x, w), product(dy, w.T)), clock)

    def attention() -> float:
        heads = max(1, size // 64)
        q, k, v = (draw(1, heads, TOKENS, 64, dtype=kind).requires_grad_() for _ in range(3))

        def run() -> None:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.backward(out.detach())

        return 12 * TOKENS**2 * 64 * heads / _least(run, clock)

    def thin(columns: int) -> float:
        x, y = draw(TOKENS, size), draw(TOKENS, 2 * size)
        a, b, h = draw(columns, size), draw(2 * size, columns), draw(TOKENS, columns)
        # All products of a LoRA layer: x A^T, h B^T; dy^T h, dy B; dh^T x, dh A
        seconds = _least(lambda: (x @ a.T, h @ b.T, y.T @ h, y @ b, h.T @ x, h @ a), clock)
        return 6 * TOKENS * columns * 3 * size / seconds

    def call() -> float:
        x = torch.ones(4, requires_grad=True)

        def run() -> None:
            y = x
            for _ in range(100):
                y = y * 1.0
            y.sum().backward()

        return _least(run, clock) / 200  # forward and backward

    kind = getattr(torch, dtype)
    source, copy = torch.ones(2, 64 * size * size // 4)
    tall, small, square = draw(2 * size, 24), draw(48, 48), draw(size // 3, size // 3)
    with torch.enable_grad():
        return Hardware(
            name=f"this machine's CPU, as PyTorch in {dtype}",
            flops=dense(kind),
            efficiency=1.0,
            bandwidth=2 * source.nbytes / _least(lambda: copy.copy_(source), clock),
            qr_flops=4 * tall.numel() * 24 / _least(lambda: torch.linalg.qr(tall), clock),
            svd_flops=22 * 48**3 / _least(lambda: torch.linalg.svd(small), clock),
            dense_svd_flops=22 * (size // 3) ** 3 / _least(lambda: torch.linalg.svd(square), clock),
            float32_flops=dense(torch.float32, product_of_rows),
            init_flops=dense(kind, product_of_rows),
            attention_flops=attention(),
            thin=tuple((k, thin(k)) for k in THIN_COLUMNS),
            first_touch=source.nbytes / _least(lambda: torch.ones(source.numel()), clock),
            call=call(),
            heap=True,
        )


def _least(run: Callable[[], object], clock: Clock, repeats: int = 3) -> float:
    """Seconds of a call, after one that warms up: the least, since what else the machine does only adds to it."""
    times = []
    for _ in range(repeats + 1):
        began = clock()
        run()
        times.append(clock() - began)
    return min(times[1:])
