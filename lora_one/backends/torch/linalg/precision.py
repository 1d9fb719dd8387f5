"""Full float32 in a block of code, whatever the user's global flags and autocast say."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_inside = threading.local()  # autocast is per thread


@contextmanager
def no_reduced_matmul() -> Iterator[None]:
    """No TF32 and no bfloat16 passes inside float32 matmuls; the flags are as they were afterwards."""
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, mkldnn.fp32_precision
    cuda.fp32_precision = mkldnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        cuda.fp32_precision, mkldnn.fp32_precision = before


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """The same, and no autocast. Where that holds already it costs next to nothing.

    A program that torch.compile traces has the precision of whoever calls it: flags cannot be switched inside.
    """
    if torch.compiler.is_compiling():
        yield
        return
    if getattr(_inside, "block", False) or _holds(device):
        yield
        return
    _inside.block = True
    try:
        with no_reduced_matmul(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        _inside.block = False


@torch.compiler.disable  # flags are no tensors
def _holds(device: torch.device) -> bool:
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return cuda.fp32_precision == mkldnn.fp32_precision == "ieee" and not torch.is_autocast_enabled(device.type)
