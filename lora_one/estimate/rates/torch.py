"""The rates of this machine's CPU at the operations of a PyTorch model's training step and init."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from lora_one.backends.torch.linalg.onednn import product_of_rows
from lora_one.estimate.hardware import Hardware

from .timing import THIN_COLUMNS, Clock, least

TOKENS = 256
CALLS = 100


def by_torch(dtype: str, size: int = 1024, clock: Clock = time.perf_counter) -> Hardware:
    """Measure PyTorch's products, attention and copies in a dtype, and the operations that are always in float32.

    Args:
        size: in-features of a layer, which has twice as many out-features.
        clock: in seconds.
    """
    draw = _Draw()
    model_dtype = getattr(torch, dtype)
    source, copy = torch.ones(2, 64 * size * size // 4)
    tall, small, square = draw(2 * size, 24), draw(48, 48), draw(size // 3, size // 3)
    with torch.enable_grad():
        return Hardware(
            name=f"this machine's CPU, as PyTorch in {dtype}",
            flops=_dense_rate(draw, size, model_dtype, clock, lambda a, b: a @ b.T),
            efficiency=1.0,
            bandwidth=2 * source.nbytes / least(lambda: copy.copy_(source), clock),
            qr_flops=4 * tall.numel() * 24 / least(lambda: torch.linalg.qr(tall), clock),
            svd_flops=22 * 48**3 / least(lambda: torch.linalg.svd(small), clock),
            dense_svd_flops=22 * (size // 3) ** 3 / least(lambda: torch.linalg.svd(square), clock),
            float32_flops=_dense_rate(draw, size, torch.float32, clock, product_of_rows),
            init_flops=_dense_rate(draw, size, model_dtype, clock, product_of_rows),
            attention_flops=_attention_rate(draw, size, model_dtype, clock),
            thin=tuple((k, _thin_rate(draw, size, k, clock)) for k in THIN_COLUMNS),
            first_touch=source.nbytes / least(lambda: torch.ones(source.numel()), clock),
            call=_seconds_per_call(clock),
        )


class _Draw:
    """Random matrices from one seed."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(dtype)


def _dense_rate(
    draw: _Draw, size: int, dtype: torch.dtype, clock: Clock, product: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """Return the rate of a layer's products, forward and backward.

    Args:
        product: (a, b) -> a b^T.
    """
    x, w, dy = draw(TOKENS, size, dtype=dtype), draw(2 * size, size, dtype=dtype), draw(TOKENS, 2 * size, dtype=dtype)
    return 8 * TOKENS * size * size / least(lambda: (product(x, w), product(dy, w.T)), clock)


def _attention_rate(draw: _Draw, size: int, dtype: torch.dtype, clock: Clock) -> float:
    heads = max(1, size // 64)
    q, k, v = (draw(1, heads, TOKENS, 64, dtype=dtype).requires_grad_() for _ in range(3))

    def run() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.backward(out.detach())

    return 12 * TOKENS**2 * 64 * heads / least(run, clock)


def _thin_rate(draw: _Draw, size: int, columns: int, clock: Clock) -> float:
    x, y = draw(TOKENS, size), draw(TOKENS, 2 * size)
    a, b, h = draw(columns, size), draw(2 * size, columns), draw(TOKENS, columns)
    # All products of a LoRA layer: x A^T, h B^T; dy^T h, dy B; dh^T x, dh A
    seconds = least(lambda: (x @ a.T, h @ b.T, y.T @ h, y @ b, h.T @ x, h @ a), clock)
    return 6 * TOKENS * columns * 3 * size / seconds


def _seconds_per_call(clock: Clock) -> float:
    x = torch.ones(4, requires_grad=True)

    def run() -> None:
        y = x
        for _ in range(CALLS):
            y = y * 1.0
        y.sum().backward()

    return least(run, clock) / (2 * CALLS)  # forward and backward
