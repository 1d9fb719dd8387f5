"""Linear layers that keep nothing for their backward pass while their weights are frozen.

PyTorch's own layer keeps its weight after it has run. A layer that keeps nothing does not have to be recomputed, so
recomputing a block ends before its last layer. On a CPU float32 goes through oneDNN in both directions.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_one.backends.torch.linalg import onednn


@contextmanager
def frozen_linears(model: nn.Module) -> Iterator[None]:
    """Let the frozen linear layers of a model keep nothing, inside the block."""
    with ExitStack() as stack:
        for layer in model.modules():
            # Exact types: quantised weights and the layers around them compute something else. A `forward` on the
            # layer itself is somebody's hook.
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
        return onednn.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _FrozenLinear.apply(dy, ctx.weight.mT, None), None, None  # dL/dx, itself differentiable
