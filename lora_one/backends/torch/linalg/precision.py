"""Full float32 precision in a block of code, whatever the user's global flags and autocast say."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_state = threading.local()  # autocast is per thread


def widened(x: Tensor) -> Tensor:
    """Return `x` itself if it is float32 or float64, else `x` as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def no_reduced_matmul() -> Iterator[None]:
    """Switch off TF32 and bfloat16 passes in float32 products. Afterwards the flags are what they were."""
    cuda, onednn = _matmul_flags()
    before = cuda.fp32_precision, onednn.fp32_precision
    cuda.fp32_precision = onednn.fp32_precision = "ieee"
    try:
        yield
    finally:
        cuda.fp32_precision, onednn.fp32_precision = before


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off reduced products, as `no_reduced_matmul` does, and autocast too.

    Inside another such block this costs next to nothing. A program that torch.compile traces has the precision of its
    caller, because flags cannot be switched inside it.
    """
    if torch.compiler.is_compiling():
        yield
        return
    if getattr(_state, "in_full_precision", False) or _is_full_already(device):
        yield
        return
    _state.in_full_precision = True
    try:
        with no_reduced_matmul(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        _state.in_full_precision = False


@torch.compiler.disable  # flags are not tensors
def _is_full_already(device: torch.device) -> bool:
    cuda, onednn = _matmul_flags()
    return cuda.fp32_precision == onednn.fp32_precision == "ieee" and not torch.is_autocast_enabled(device.type)


def _matmul_flags() -> tuple[Any, Any]:
    """Return PyTorch's settings for matrix products on CUDA and in oneDNN."""
    mkldnn: Any = torch.backends.mkldnn  # PyTorch's type hints lack its `matmul`
    return torch.backends.cuda.matmul, mkldnn.matmul
