"""The gradient of a linear layer's weight, for weights that are frozen or quantised and have none of their own.

A tap replaces a LoRA layer. It returns the base layer's output unchanged, and its backward pass gives
G = sum over tokens of dL/dy x^T to a parameter that is never read: a single zero, broadcast to the shape of W.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lora_one.backends.mlx.layout import LoraModule, is_switch


class Tap(nn.Module):
    """A dense layer whose `gradient`, (out, in), has the layer's G as its gradient."""

    def __init__(self, layer: LoraModule):
        super().__init__()
        self.linear: Any = layer.linear
        self.gradient = _unread((layer.lora_b.shape[1], layer.lora_a.shape[0]), layer)

    def __call__(self, x: mx.array) -> mx.array:
        y: Any = _dense(self.linear(x), mx.stop_gradient(x), self.gradient)
        return y


class SwitchTap(nn.Module):
    """A mixture-of-experts layer whose `gradient`, (experts, out, in), has every expert's G as its gradient."""

    def __init__(self, layer: LoraModule):
        super().__init__()
        self.linear: Any = layer.linear
        self.gradient = _unread((layer.num_experts, layer.lora_b.shape[1], layer.lora_a.shape[2]), layer)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y: Any = self.linear(x, indices, sorted_indices=sorted_indices)
        y = _SWITCH[sorted_indices](y, mx.stop_gradient(x), indices, self.gradient)
        return y


def tap(layer: LoraModule) -> Tap | SwitchTap:
    """Return a tap on the base layer of a LoRA layer, which can replace it."""
    return SwitchTap(layer) if is_switch(layer) else Tap(layer)


def zeros_without_memory(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return zeros that are a single one, broadcast."""
    return mx.broadcast_to(mx.zeros((), dtype=dtype), shape)


def _unread(shape: tuple[int, ...], layer: LoraModule) -> mx.array:
    """Return zeros for a parameter that is never read. Their dtype is that of G."""
    return zeros_without_memory(shape, mx.float64 if layer.lora_a.dtype == mx.float64 else mx.float32)


@mx.custom_function
def _dense(y: mx.array, x: mx.array, gradient: mx.array) -> mx.array:
    return y


@_dense.vjp
def _dense_vjp(primals: Any, dy: mx.array, y: mx.array) -> Any:
    _, x, gradient = primals
    rows = dy.reshape(-1, dy.shape[-1]).astype(gradient.dtype)  # (tokens, out)
    columns = x.reshape(-1, x.shape[-1]).astype(gradient.dtype)  # (tokens, in)
    return dy, mx.zeros_like(x), rows.T @ columns  # (out, in)


def _switch(sorted_indices: bool) -> Any:
    """Return the function of a mixture-of-experts layer: y, and G of each expert in the backward pass."""

    @mx.custom_function
    def tapped(y: mx.array, x: mx.array, indices: mx.array, gradient: mx.array) -> mx.array:
        return y

    @tapped.vjp
    def tapped_vjp(primals: Any, dy: mx.array, y: mx.array) -> Any:
        _, x, indices, gradient = primals

        def product(weight: mx.array) -> mx.array:  # (experts, out, in) -> the layer's output without its bias
            return mx.gather_mm(
                x.astype(weight.dtype), weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices
            )

        _, (expert_gradients,) = mx.vjp(product, [gradient], [dy.astype(gradient.dtype)])  # (experts, out, in)
        return dy, mx.zeros_like(x), mx.zeros_like(indices), expert_gradients

    return tapped


_SWITCH = {sorted_indices: _switch(sorted_indices) for sorted_indices in (False, True)}
