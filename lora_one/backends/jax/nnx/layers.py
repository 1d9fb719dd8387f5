"""LoRA inside Flax NNX layers: the layer's own class with two more parameters.

A layer is adapted by giving it a subclass of its class (static, so that it pickles), which keeps its paths, its
parameters and their values as they are. Wrapping it in nnx.LoRA would move them, and fails where outputs have axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from lora_one.backends.jax.layout import Layout, einsum_groups, plain_layout
from lora_one.backends.jax.product import add_einsum, add_general
from lora_one.errors import ModelError

PARAM = "kernel"


def factors_of(layer: nnx.Module, param: str = PARAM) -> tuple[jax.Array, jax.Array, float]:
    """(lora_a, lora_b, scale) of an adapted layer, for the `__call__` of its class."""
    a, b = getattr(layer, f"{param}_lora_a"), getattr(layer, f"{param}_lora_b")
    return a[...], b[...], getattr(layer, f"{param}_lora_scale")


class LoraLinear(nnx.Linear):
    """nnx.Linear: x W + bias + scale * x a b."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding=out_sharding)
        return add_general(y, inputs, *factors_of(self), axis=(inputs.ndim - 1,))


class LoraLinearGeneral(nnx.LinearGeneral):
    """nnx.LinearGeneral, as in nnx.MultiHeadAttention."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding=out_sharding)
        axis = tuple(i % inputs.ndim for i in self.axis)
        batch_axis = tuple(i % inputs.ndim for i in self.batch_axis)
        return add_general(y, inputs, *factors_of(self), axis=axis, batch_axis=batch_axis)


class LoraEinsum(nnx.Einsum):
    """nnx.Einsum, with the equation it was made with or is called with."""

    def __call__(self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, einsum_str, out_sharding=out_sharding)
        return add_einsum(y, inputs, *factors_of(self), equation=einsum_str or self.einsum_str)


class Kind(NamedTuple):
    """How one class of layers is adapted."""

    adapted: type[nnx.Module]
    layout: Callable[[Any], Layout]
    param: str


def _check_front(kernel: Any, expected: tuple[int, ...]) -> None:
    """Raises ValueError where nnx.vmap or nnx.scan stack a layer along another axis than the first ones."""
    shape = tuple(kernel.shape)
    if shape[len(shape) - len(expected) :] != expected:
        raise ValueError(
            f"its kernel must be (stack..., {', '.join(map(str, expected))}), got {shape}: stack along axis 0"
        )


def _linear(layer: nnx.Linear) -> Layout:
    _check_front(layer.kernel, (layer.in_features, layer.out_features))
    return plain_layout(layer.kernel.shape, 1, 1)


def _linear_general(layer: nnx.LinearGeneral) -> Layout:
    _check_front(layer.kernel, (*layer.in_features, *layer.out_features))
    return plain_layout(layer.kernel.shape, len(layer.in_features), len(layer.out_features))


def _einsum(layer: nnx.Einsum) -> Layout:
    if layer.einsum_str is None:
        raise ValueError("it gets its equation at each call; make it with einsum_str=...")
    _check_front(layer.kernel, tuple(layer.kernel_shape))
    kernel = layer.einsum_str.replace(" ", "").split("->")[0].split(",")[1]
    shape = layer.kernel.shape
    stacked = len(shape) - len(kernel)
    groups = [tuple(stacked + kernel.index(c) for c in group) for group in einsum_groups(layer.einsum_str)]
    return Layout(shape, tuple(range(stacked)) + groups[0], groups[1], groups[2])


_KINDS: dict[type[nnx.Module], Kind] = {
    nnx.Linear: Kind(LoraLinear, _linear, PARAM),
    nnx.LinearGeneral: Kind(LoraLinearGeneral, _linear_general, PARAM),
    nnx.Einsum: Kind(LoraEinsum, _einsum, PARAM),
}


def register_layer(
    layer: type[nnx.Module], adapted: type[nnx.Module], layout: Callable[[Any], Layout], param: str = PARAM
) -> None:
    """Teach `lora_one.init` a linear layer of your own.

    Args:
        layer: the class, exactly.
        adapted: a subclass of it, defined at the top of a module, whose `__call__` adds the LoRA product: see
            `factors_of`, and `add_general` and `add_einsum` in `lora_one.backends.jax.product`.
        layout: from a layer, what the axes of its weight are; see `plain_layout`.
        param: the weight's name in the layer.

    Raises:
        ModelError: `adapted` is not a subclass of `layer`.
    """
    if not (isinstance(adapted, type) and issubclass(adapted, layer)) or adapted is layer:
        raise ModelError(f"adapted must be a subclass of {layer.__name__}, got {adapted!r}")
    _KINDS[layer] = Kind(adapted, layout, param)


def kind_of(layer: Any) -> Kind | None:
    """How a layer is adapted; None if it is no linear layer that we know.

    Raises:
        ValueError: a subclass of a known layer, whose own `__call__` the known layer's would replace.
    """
    kind = _KINDS.get(type(layer))
    if kind is None:
        for known in _KINDS:
            if isinstance(layer, known):
                raise ValueError(
                    f"it is a {type(layer).__name__}, a subclass of {known.__name__}: register it with register_layer"
                )
    return kind


def adapted_kind(layer: Any) -> tuple[type[nnx.Module], Kind] | None:
    """(the plain class, how it was adapted) of an adapted layer; None for any other object."""
    for plain, kind in _KINDS.items():
        if type(layer) is kind.adapted:
            return plain, kind
    return None


def is_linear(layer: Any) -> bool:
    """Whether a layer is one of the known kinds, adapted or not."""
    return isinstance(layer, tuple(_KINDS))
