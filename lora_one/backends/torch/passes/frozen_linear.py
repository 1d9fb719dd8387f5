"""Linear layers while their weights are frozen: nothing is kept for their backward pass, and float32 on a CPU goes
through oneDNN in both directions.

What is not kept need not be recomputed: recomputing a block ends before its last layer. (PyTorch's own layer has its
weight kept, after it has run.)

PyTorch multiplies float32 matrices by MKL, which on some of AMD's processors runs at half the speed of oneDNN; what it
compiles goes through oneDNN. The operator for that has no public name: where it is missing, MKL multiplies.
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
    return _by_onednn(a, b, None) if _is_for_onednn(a, b) else a @ b.mT


@contextmanager
def frozen_linears(model: nn.Module) -> Iterator[None]:
    """A model's frozen linear layers keep nothing for a while."""
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
    if learns or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    return _FrozenLinear.apply(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # not `save_for_backward`, which checkpointing would have to repeat
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _FrozenLinear.apply(dy, ctx.weight.mT, None), None, None  # dL/dx, in a form that has a derivative too


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
