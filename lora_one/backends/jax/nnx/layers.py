"""LoRA inside Flax NNX layers: the layer's own class with two more parameters.

A layer is adapted by changing its class to a subclass, defined at the top of a module so that it pickles. This keeps
the paths, the parameters and their values as they are. Wrapping the layer in nnx.LoRA would move them, and fails where
outputs have several axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from lora_one.backends.jax.layout import Layout, einsum_layout, plain_layout
from lora_one.backends.jax.product import add_einsum, add_general
from lora_one.errors import ModelError

PARAM = "kernel"


def factors_of(layer: nnx.Module, param: str = PARAM) -> tuple[jax.Array, jax.Array, float]:
    """Return (lora_a, lora_b, scale) of an adapted layer, for the `__call__` of its class."""
    a, b = getattr(layer, f"{param}_lora_a"), getattr(layer, f"{param}_lora_b")
    return a[...], b[...], getattr(layer, f"{param}_lora_scale")


class LoraLinear(nnx.Linear):
    """`nnx.Linear` with LoRA: x W + bias + scale * x a b."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding=out_sharding)
        return add_general(y, inputs, *factors_of(self), axis=(inputs.ndim - 1,))


class LoraLinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` with LoRA, as in `nnx.MultiHeadAttention`."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding=out_sharding)
        axis = tuple(i % inputs.ndim for i in self.axis)
        batch_axis = tuple(i % inputs.ndim for i in self.batch_axis)
        return add_general(y, inputs, *factors_of(self), axis=axis, batch_axis=batch_axis)


class LoraEinsum(nnx.Einsum):
    """`nnx.Einsum` with LoRA, by the equation of its constructor or of the call."""

    def __call__(self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, einsum_str, out_sharding=out_sharding)
        return add_einsum(y, inputs, *factors_of(self), equation=einsum_str or self.einsum_str)


class AdapterKind(NamedTuple):
    """The way in which one class of layers is adapted."""

    adapted: type[nnx.Module]
    layout: Callable[[Any], Layout]  # layer -> the layout of its weight
    param: str  # the weight's name


def _check_front(kernel: Any, expected: tuple[int, ...]) -> None:
    """Raise ValueError where nnx.vmap or nnx.scan stack a layer along other axes than the first ones."""
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
    return einsum_layout(layer.kernel.shape, layer.einsum_str)


_KINDS: dict[type[nnx.Module], AdapterKind] = {
    nnx.Linear: AdapterKind(LoraLinear, _linear, PARAM),
    nnx.LinearGeneral: AdapterKind(LoraLinearGeneral, _linear_general, PARAM),
    nnx.Einsum: AdapterKind(LoraEinsum, _einsum, PARAM),
}


def register_layer(
    layer: type[nnx.Module], adapted: type[nnx.Module], layout: Callable[[Any], Layout], param: str = PARAM
) -> None:
    """Teach `lora_one.init` a linear NNX layer of your own.

    Call it once, before `init` or `load`, for a layer whose weight is multiplied with the input but whose class is not
    `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum`. A `TargetsWarning` of `init` names such weights.

    Args:
        layer: the class itself; its subclasses are not meant.
        adapted: a subclass of it, defined at the top of a module, whose `__call__` adds the LoRA product. It gets the
            factors from `factors_of(self)`; `add_general` and `add_einsum` of `lora_one.backends.jax.product` add
            their product.
        layout: a function from a layer to the `Layout` of its weight; see `lora_one.backends.jax.layout.plain_layout`.
        param: the weight's name in the layer, "kernel" by default.

    Raises:
        ModelError: `adapted` is not a subclass of `layer`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import lora_one
        >>> from lora_one.backends.jax import register_layer
        >>> from lora_one.backends.jax.layout import plain_layout
        >>> from lora_one.backends.jax.nnx.layers import factors_of
        >>> from lora_one.backends.jax.product import add_general
        >>> class Projection(nnx.Module):
        ...     def __init__(self):
        ...         self.weight = nnx.Param(jnp.eye(4, 3))  # (in, out)
        ...     def __call__(self, x):
        ...         return x @ self.weight[...]
        >>> class LoraProjection(Projection):
        ...     def __call__(self, x):
        ...         return add_general(super().__call__(x), x, *factors_of(self, "weight"), axis=(x.ndim - 1,))
        >>> register_layer(Projection, LoraProjection, lambda layer: plain_layout(layer.weight.shape, 1, 1), "weight")
        >>> config = lora_one.Config(rank=1, targets=["layers.0"])
        >>> model, report = lora_one.init(
        ...     nnx.Sequential(Projection()), [jnp.ones((2, 4))], lambda model, x: jnp.mean(model(x) ** 2), config
        ... )
        >>> type(model.layers[0]).__name__, model.layers[0].weight_lora_b.shape
        ('LoraProjection', (1, 3))
    """
    if not (isinstance(adapted, type) and issubclass(adapted, layer)) or adapted is layer:
        raise ModelError(f"adapted must be a subclass of {layer.__name__}, got {adapted!r}")
    _KINDS[layer] = AdapterKind(adapted, layout, param)


def kind_of(layer: Any) -> AdapterKind | None:
    """Return the way in which a layer is adapted; None if it is no linear layer that we know.

    Raises:
        ValueError: a subclass of a known layer, whose own `__call__` would be replaced by the known layer's.
    """
    kind = _KINDS.get(type(layer))
    if kind is None:
        for linear in _KINDS:
            if isinstance(layer, linear):
                raise ValueError(
                    f"it is a {type(layer).__name__}, a subclass of {linear.__name__}: register it with register_layer"
                )
    return kind


def adapted_kind(layer: Any) -> tuple[type[nnx.Module], AdapterKind] | None:
    """Return an adapted layer's plain class and how it was adapted; None for any other object."""
    for plain, kind in _KINDS.items():
        if type(layer) is kind.adapted:
            return plain, kind
    return None


def is_linear(layer: Any) -> bool:
    """Return whether a layer is one of the known kinds, adapted or not."""
    return isinstance(layer, tuple(_KINDS))
