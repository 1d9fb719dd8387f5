"""The gradient of a linear layer's weight without asking the weight for it, so that it may be frozen or quantised.

A tap returns the layer's output unchanged; its backward pass sees x and dL/dy, and G = sum over tokens of dL/dy x^T.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .precision import full_precision

Sink = Callable[[Tensor], None]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = dy.reshape(-1, dy.shape[-1]).to(wide)  # (tokens, out)
        columns = x.reshape(-1, x.shape[-1]).to(wide)  # (tokens, in)
        with full_precision(x.device):
            ctx.sink(rows.mT @ columns)  # (out, in)
        return dy, None, None, None


def tap(layer: nn.Module, sink: Sink, on_call: Callable[[], None]) -> torch.utils.hooks.RemovableHandle:
    """Hand G of each call of a linear layer to `sink` during backward passes, until the handle is removed.

    Args:
        layer: computes y (..., out) from its first argument x (..., in); nothing in it needs to require a gradient.
        sink: called with (out, in), float32 or wider, once a call of the layer that the loss depends on.
        on_call: called at each forward pass that records a graph.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return y
        on_call()
        # Something must require a gradient for the graph to exist, and here no weight does.
        anchor = torch.zeros((), device=y.device, requires_grad=True)
        return _Tap.apply(y, args[0], anchor, sink)

    return layer.register_forward_hook(hook)
