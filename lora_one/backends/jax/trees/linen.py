"""LoRA in Linen layers by interception: factors lie beside the kernel in "params", so that nn.scan slices them too."""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import linen, nnx

from lora_one.backends.jax.layout import Layout, einsum_layout, lifted, plain_layout
from lora_one.backends.jax.product import Dropping, add_einsum, add_general

PARAM = "kernel"
KINDS = (linen.Dense, linen.DenseGeneral, linen.Einsum)


def intercepted(scaling: float, dropout: float) -> Callable[..., Any]:
    """Return an interceptor for `linen.intercept_methods` that adds scaling * x a b where a layer has factors.

    Args:
        scaling: s.
        dropout: the share of x that is dropped before a, by the layer's stream "dropout"; 0 needs no stream.
    """

    def interceptor(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        layer = context.module
        if context.method_name != "__call__" or not layer.has_variable("params", f"{PARAM}_lora_a"):
            return y
        a, b = (layer.get_variable("params", f"{PARAM}_lora_{side}") for side in "ab")
        if dropout:
            a = Dropping(a, partial(nnx.Dropout(dropout), rngs=layer.make_rng("dropout")))
        x = args[0] if args else kwargs["inputs"]
        if isinstance(layer, linen.Einsum):
            return add_einsum(y, x, a, b, scaling, _equation(layer, args, kwargs))
        axis, batch_axis = _axes(layer, x.ndim)
        return add_general(y, x, a, b, scaling, axis=axis, batch_axis=batch_axis)

    return interceptor


def recording(
    layouts: dict[str, Layout], problems: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> Callable[..., Any]:
    """Return an interceptor that notes the axes of the kernel of each linear layer that is called.

    Args:
        layouts: gets an entry per layer.
        problems: gets the reason per layer that cannot have LoRA.
        shapes: shapes of the kernels as they are stored, by layer; where nn.scan stacks a layer, they have more axes
            than the layer sees. The kernels themselves must be `tracked`.
    """

    def interceptor(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        layer = context.module
        name = ".".join(layer.path)
        if context.method_name == "__call__" and isinstance(layer, KINDS) and name in shapes:
            x = args[0] if args else kwargs["inputs"]
            try:
                if type(layer) not in KINDS:
                    raise ValueError(f"it is a {type(layer).__name__}, a subclass of a layer of flax.linen")
                kernel: Any = layer.get_variable("params", PARAM)
                inner = _layout(layer, x.ndim, args, kwargs, tuple(kernel.value.shape))
                layouts[name] = lifted(inner, shapes[name], kernel.lifts)
            except ValueError as error:
                problems[name] = str(error)
        return y

    return interceptor


def with_factors(params: Any, lora: dict[str, dict[str, Any]]) -> Any:
    """Return the parameters with each layer's factors beside its kernel.

    What is trained whole takes the places of the module's own parameters.
    """
    params = dict(params)
    for name, factors in lora.items():
        node = params
        for part in name.split("."):
            node[part] = dict(node[part])
            node = node[part]
        node.update(factors)
    return params


def _layout(layer: Any, ndim: int, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Layout:
    if isinstance(layer, linen.Einsum):
        return einsum_layout(shape, _equation(layer, args, kwargs))
    axis, _ = _axes(layer, ndim)
    features = (layer.features,) if isinstance(layer.features, int) else tuple(layer.features)
    return plain_layout(shape, len(axis), len(features))


def _axes(layer: Any, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the axes of an input with `ndim` axes that a layer contracts, and those that its kernel has too."""
    if isinstance(layer, linen.Dense):
        return (ndim - 1,), ()
    axis = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
    return tuple(i % ndim for i in axis), tuple(i % ndim for i in layer.batch_dims)


def _equation(layer: linen.Einsum, args: Any, kwargs: Any) -> str:
    called: Any = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    return str(called or layer.einsum_str).replace(" ", "")
