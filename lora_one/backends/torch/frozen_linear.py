"""Float32 linear layers on a CPU by oneDNN, in both directions, while their weights are frozen.

PyTorch multiplies float32 matrices by MKL, which on AMD's processors runs at half the speed of oneDNN; what it compiles
goes through oneDNN. The operator for that has no public name: where it is missing, everything is as it was.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T of large matrices (m, k), (n, k), -> (m, n)."""
    return _linear(a, b, None) if _is_for_onednn(a, b) else a @ b.mT


@contextmanager
def onednn_linears(model: nn.Module) -> Iterator[None]:
    """A model's frozen float32 linear layers on a CPU go through oneDNN for a while."""
    with ExitStack() as stack:
        for layer in model.modules():
            # Exact types: quantised weights and the layers around them compute something else. A `forward` of the
            # layer's own is somebody's hook.
            if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and "forward" not in vars(layer):
                layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
                stack.callback(delattr, layer, "forward")
        yield


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if learns or not _is_for_onednn(x, weight) or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    return _FrozenLinear.apply(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _FrozenLinear.apply(dy, weight.mT, None), None, None  # dL/dx, in a form that has a derivative too


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
