"""LoRA inside Flax NNX layers: the layer's own class with two more parameters.

A layer is adapted by changing its class to a subclass, defined at the top of a module so that it pickles. This keeps
the paths, the parameters and their values as they are. Wrapping the layer in nnx.LoRA would move them, and fails where
outputs have several axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from lora_one.backends.jax.layout import Layout, einsum_layout, plain_layout, possible_layouts
from lora_one.backends.jax.product import Dropping, add_einsum, add_general
from lora_one.backends.jax.tap import Tap
from lora_one.errors import ModelError

from .dora import with_magnitudes
from .lookups import KERNEL, TABLE, LoraConv, LoraEmbed, kernel_layouts, table_layouts

PARAM = "kernel"


def factors_of(layer: nnx.Module, param: str = PARAM) -> tuple[Any, jax.Array, float]:
    """Return (lora_a, lora_b, scale) of an adapted layer, for the `__call__` of its class.

    While dropout is on, `Dropping` stands for lora_a: `add_general` and `add_einsum` know it.
    """
    a, b = (getattr(layer, f"{param}_lora_{side}")[...] for side in "ab")
    dropout = getattr(layer, f"{param}_lora_dropout", None)
    if dropout is not None and not dropout.deterministic and not isinstance(a, Tap):
        a = Dropping(a, dropout)
    return a, b, getattr(layer, f"{param}_lora_scale")


class LoraLinear(nnx.Linear):
    """`nnx.Linear` with LoRA: x W + bias + scale * x a b."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding=out_sharding)
        y = add_general(y, inputs, *factors_of(self), axis=(inputs.ndim - 1,))
        return with_magnitudes(self, y, _linear(self)[0])


class LoraLinearGeneral(nnx.LinearGeneral):
    """`nnx.LinearGeneral` with LoRA, as in `nnx.MultiHeadAttention`."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding=out_sharding)
        axis = tuple(i % inputs.ndim for i in self.axis)
        batch_axis = tuple(i % inputs.ndim for i in self.batch_axis)
        y = add_general(y, inputs, *factors_of(self), axis=axis, batch_axis=batch_axis)
        return with_magnitudes(self, y, _linear_general(self)[0])


class LoraEinsum(nnx.Einsum):
    """`nnx.Einsum` with LoRA, by the equation of its constructor or of the call."""

    def __call__(self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, einsum_str, out_sharding=out_sharding)
        return add_einsum(y, inputs, *factors_of(self), equation=einsum_str or self.einsum_str)


class AdapterKind(NamedTuple):
    """The way in which one class of layers is adapted."""

    adapted: type[nnx.Module]
    layouts: Callable[[Any], list[Layout]]  # layer -> the layouts that its weight may have, the first by default
    param: str  # the weight's name
    dora: Callable[[Any], bool] = lambda layer: False  # layer -> whether `adapted` takes magnitudes for it

    @property
    def lifts(self) -> str:
        """The attribute of an adapted layer that holds the `lifts` of its layout, where it is not the first one."""
        return f"{self.param}_lora_lifts"

    def layout(self, layer: Any) -> Layout:
        """Return the layout of a layer's weight.

        Raises:
            ValueError: the layer cannot have LoRA, with the reason.
        """
        lifts = getattr(layer, self.lifts, None)
        return self.layouts(layer)[0] if lifts is None else self.layout_of(layer, lifts)

    def layout_of(self, layer: Any, lifts: tuple[int, ...]) -> Layout:
        """Return the layout of a layer's weight that is stacked along these axes.

        Raises:
            ValueError: the layer cannot have LoRA, with the reason.
        """
        layouts = self.layouts(layer)
        for layout in layouts:
            if layout.lifts == lifts:
                return layout
        raise ValueError(f"its {self.param} {layouts[0].shape} cannot be stacked along the axes {lifts}")


def _linear(layer: nnx.Linear) -> list[Layout]:
    inner = plain_layout((layer.in_features, layer.out_features), 1, 1)
    return possible_layouts(layer.kernel.shape, inner)


def _linear_general(layer: nnx.LinearGeneral) -> list[Layout]:
    ins, outs = layer.in_features, layer.out_features
    inner = plain_layout((*layer.batch_axis.values(), *ins, *outs), len(ins), len(outs))
    return possible_layouts(layer.kernel.shape, inner)


def _einsum(layer: nnx.Einsum) -> list[Layout]:
    if layer.einsum_str is None:
        raise ValueError("it gets its equation at each call; make it with einsum_str=...")
    inner = einsum_layout(tuple(layer.kernel_shape), layer.einsum_str)
    return possible_layouts(layer.kernel.shape, inner)


_KINDS: dict[type[nnx.Module], AdapterKind] = {
    nnx.Linear: AdapterKind(LoraLinear, _linear, PARAM, lambda layer: True),
    nnx.LinearGeneral: AdapterKind(LoraLinearGeneral, _linear_general, PARAM, lambda layer: not layer.batch_axis),
    nnx.Einsum: AdapterKind(LoraEinsum, _einsum, PARAM),
    nnx.Embed: AdapterKind(LoraEmbed, table_layouts, TABLE),
    nnx.Conv: AdapterKind(LoraConv, kernel_layouts, KERNEL),
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
    _KINDS[layer] = AdapterKind(adapted, lambda one: [layout(one)], param)


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


def may_have_lora(layer: Any) -> bool:
    """Return whether a layer is one of the known kinds, adapted or not."""
    return isinstance(layer, tuple(_KINDS))


def is_linear(layer: Any) -> bool:
    """Return whether "all-linear" means a layer: embeddings and convolutions must be named."""
    return may_have_lora(layer) and not isinstance(layer, (nnx.Embed, nnx.Conv))
