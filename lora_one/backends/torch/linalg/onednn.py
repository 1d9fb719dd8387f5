"""Products of float32 matrices on a CPU through oneDNN.

PyTorch multiplies float32 matrices with MKL, which reaches half of oneDNN's speed on some AMD processors. Compiled
PyTorch code uses oneDNN already. The operator has no public name; where it is missing, MKL multiplies.
"""

import torch
from torch import Tensor
from torch.nn import functional

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b^T of large matrices (m, k), (n, k), -> (m, n)."""
    return _by_onednn(a, b, None) if _is_for_onednn(a, b) else a @ b.mT


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, as `torch.nn.functional.linear` does."""
    return _by_onednn(x, weight, bias) if _is_for_onednn(x, weight) else functional.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert _ONEDNN is not None
    return _ONEDNN(x, weight, bias, "none", [], "")


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _ONEDNN is not None
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and x.ndim > 1
    )
