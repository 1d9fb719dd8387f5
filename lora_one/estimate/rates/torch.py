"""How fast this machine's CPU is at what a PyTorch model's training step and init consist of."""

import time
from collections.abc import Callable
from typing import Any

import torch

from lora_one.backends.torch.linalg.onednn import product_of_rows
from lora_one.estimate.hardware import Hardware

from .timing import THIN_COLUMNS, Clock, least

TOKENS = 256


def by_torch(dtype: str, size: int = 1024, clock: Clock = time.perf_counter) -> Hardware:
    """PyTorch's products, attention and copies in a dtype, and what is done in float32 anyway.

    Args:
        size: in-features of a layer; it has twice as many out-features.
        clock: in seconds.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.randn(*shape, generator=generator).to(dtype)

    def dense(kind: Any, product: Callable[[Any, Any], Any] = lambda a, b: a @ b.T) -> float:
        """Of a layer in both directions, by a @ b^T."""
        x, w, dy = draw(TOKENS, size, dtype=kind), draw(2 * size, size, dtype=kind), draw(TOKENS, 2 * size, dtype=kind)
        return 8 * TOKENS * size * size / least(lambda: (product(x, w), product(dy, w.T)), clock)

    def attention() -> float:
        heads = max(1, size // 64)
        q, k, v = (draw(1, heads, TOKENS, 64, dtype=kind).requires_grad_() for _ in range(3))

        def run() -> None:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.backward(out.detach())

        return 12 * TOKENS**2 * 64 * heads / least(run, clock)

    def thin(columns: int) -> float:
        x, y = draw(TOKENS, size), draw(TOKENS, 2 * size)
        a, b, h = draw(columns, size), draw(2 * size, columns), draw(TOKENS, columns)
        # All products of a LoRA layer: x A^T, h B^T; dy^T h, dy B; dh^T x, dh A
        seconds = least(lambda: (x @ a.T, h @ b.T, y.T @ h, y @ b, h.T @ x, h @ a), clock)
        return 6 * TOKENS * columns * 3 * size / seconds

    def call() -> float:
        x = torch.ones(4, requires_grad=True)

        def run() -> None:
            y = x
            for _ in range(100):
                y = y * 1.0
            y.sum().backward()

        return least(run, clock) / 200  # forward and backward

    kind = getattr(torch, dtype)
    source, copy = torch.ones(2, 64 * size * size // 4)
    tall, small, square = draw(2 * size, 24), draw(48, 48), draw(size // 3, size // 3)
    with torch.enable_grad():
        return Hardware(
            name=f"this machine's CPU, as PyTorch in {dtype}",
            flops=dense(kind),
            efficiency=1.0,
            bandwidth=2 * source.nbytes / least(lambda: copy.copy_(source), clock),
            qr_flops=4 * tall.numel() * 24 / least(lambda: torch.linalg.qr(tall), clock),
            svd_flops=22 * 48**3 / least(lambda: torch.linalg.svd(small), clock),
            dense_svd_flops=22 * (size // 3) ** 3 / least(lambda: torch.linalg.svd(square), clock),
            float32_flops=dense(torch.float32, product_of_rows),
            init_flops=dense(kind, product_of_rows),
            attention_flops=attention(),
            thin=tuple((k, thin(k)) for k in THIN_COLUMNS),
            first_touch=source.nbytes / least(lambda: torch.ones(source.numel()), clock),
            call=call(),
            heap=True,
        )
