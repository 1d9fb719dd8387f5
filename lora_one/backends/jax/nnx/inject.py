"""Put LoRA into the linear layers of an NNX model, in place, and take it out again."""

import math
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.placement import full_spec, kernel_sharding
from lora_one.backends.jax.sites import dotted, factor_dtype
from lora_one.errors import ModelError

from .dora import DoraMagnitude
from .layers import AdapterKind, kind_of, may_have_lora

Lifts = tuple[int, ...]  # see `Layout`


class Injected(NamedTuple):
    """A layer that LoRA was put into."""

    layer: nnx.Module
    plain: type  # the layer's class before
    names: list[str]  # the attributes that were added


def linear_layers(model: nnx.Module) -> dict[str, nnx.Module]:
    """Return the layers that LoRA may go to, adapted or not, by path."""
    return {dotted(path): layer for path, layer in nnx.iter_graph(model) if may_have_lora(layer)}


def inject(
    model: nnx.Module,
    plan: dict[str, tuple[int, float]],
    dropout: float = 0.0,
    seed: int = 0,
    lifts: Mapping[str, Lifts] = MappingProxyType({}),
    dora: bool = False,
) -> list[Injected]:
    """Give layers their LoRA class and zero factors.

    Args:
        model: changed in place.
        plan: name -> (rank, scaling).
        dropout: rate of the dropout before lora_a; 0 makes none.
        seed: of its random numbers.
        lifts: name -> the axes of its stack, where they are not those of the first layout that its sizes admit.
        dora: whether they get magnitudes, which are zero too.

    Returns:
        What `take_out` needs to restore the model.

    Raises:
        ModelError: names every layer that cannot be adapted, with the reason; then no layer has been changed.
    """
    layers = linear_layers(model)
    problems, ready = [], []
    for name in plan:
        try:
            ready.append((name, layers[name], *_checked(layers[name], lifts.get(name), dora)))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ModelError("LoRA cannot be attached to these layers:\n  " + "\n  ".join(problems))
    injected = []
    for name, layer, kind, layout in ready:
        injected.append(_inject(layer, kind, layout, *plan[name], dora))
        if dropout:
            _add(injected[-1], f"{kind.param}_lora_dropout", _dropout(dropout, layout, name, seed))
        if name in lifts:
            _add(injected[-1], kind.lifts, lifts[name])
    return injected


def _add(injected: Injected, name: str, value: Any) -> None:
    injected.names.append(name)
    setattr(injected.layer, name, value)


def dropout_of(model: nnx.Module) -> float:
    """Return the rate of the dropout before lora_a; the highest if the layers have several."""
    return max((dropout.rate for dropout in _dropouts(model)), default=0.0)


def train_dropout(model: nnx.Module, on: bool) -> None:
    """Switch the dropout before lora_a on or off, as `model.train()` and `model.eval()` do."""
    for dropout in _dropouts(model):
        dropout.deterministic = not on


def _dropouts(model: nnx.Module) -> list[Any]:
    return [module for path, module in nnx.iter_modules(model) if path and str(path[-1]).endswith("_lora_dropout")]


def _dropout(rate: float, layout: Layout, name: str, seed: int) -> nnx.Dropout:
    """Return a layer's dropout. Each matrix of a stack has a stream of its own, which is cut along with it."""
    key, sizes = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), layout.lifted_sizes
    dropout = nnx.Dropout(rate)
    dropout.rngs = nnx.RngStream(jax.random.split(key, sizes) if sizes else key, tag="dropout")
    return dropout


def take_out(injected: list[Injected]) -> None:
    """Make adapted layers plain again, without their factors."""
    for layer, plain, names in injected:
        object.__setattr__(layer, "__class__", plain)
        for name in names:
            if hasattr(layer, name):
                delattr(layer, name)


def _checked(layer: nnx.Module, lifts: Lifts | None, dora: bool) -> tuple[AdapterKind, Layout]:
    """Return how a layer is adapted; raise ValueError with the reason if it cannot be."""
    kind = kind_of(layer)
    if kind is None:
        raise ValueError(f"it is a {type(layer).__name__}")
    kernel = getattr(layer, kind.param)
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"its {kind.param} must be floating, got {kernel.dtype}")
    _check_divides(kernel)
    layout = kind.layout(layer) if lifts is None else kind.layout_of(layer, lifts)
    if dora and (not kind.dora(layer) or any(layout.lifts)):
        raise ValueError(
            "DoRA is for nnx.Linear, and for nnx.LinearGeneral without batch_axis, stacked along axis 0 if at all: "
            "leave this layer out of the targets, or dora out of the Config"
        )
    return kind, layout


def _inject(layer: nnx.Module, kind: AdapterKind, layout: Layout, rank: int, scaling: float, dora: bool) -> Injected:
    kernel = getattr(layer, kind.param)
    dtype, spec = factor_dtype(kernel), _metadata_spec(kernel)
    a, b, scale, m = (f"{kind.param}_lora_{part}" for part in ("a", "b", "scale", "m"))
    injected = Injected(layer, type(layer), [a, b, scale, m])
    parameters: list[tuple[str, type[nnx.LoRAParam], tuple[int, ...], Any]] = [
        (a, nnx.LoRAParam, layout.a_shape(rank), layout.a_spec),
        (b, nnx.LoRAParam, layout.b_shape(rank), layout.b_spec),
    ]
    if dora:
        parameters.append((m, DoraMagnitude, layout.magnitude_shape, layout.magnitude_spec))
    for name, variable, shape, factor_spec in parameters:
        metadata = {} if spec is None else {"out_sharding": factor_spec(spec), **_mesh_metadata(kernel)}
        setattr(layer, name, variable(jnp.zeros(shape, dtype), eager_sharding=False, **metadata))
    setattr(layer, scale, scaling)
    object.__setattr__(layer, "__class__", kind.adapted)
    return injected


def _metadata_spec(kernel: nnx.Variable) -> tuple[Any, ...] | None:
    spec = kernel.get_metadata().get("out_sharding")
    return None if spec is None else full_spec(getattr(spec, "spec", spec), kernel.ndim)


def _check_divides(kernel: nnx.Variable) -> None:
    """Raise ValueError where the metadata shards an axis that the mesh does not divide."""
    sharding, spec = kernel_sharding(kernel.get_raw_value()), _metadata_spec(kernel)
    if not isinstance(sharding, NamedSharding) or spec is None:
        return
    for size, entry in zip(kernel.shape, spec, strict=True):
        names = entry if isinstance(entry, tuple) else (entry,)
        parts = math.prod(sharding.mesh.shape.get(name, 1) for name in names if isinstance(name, str))
        if size % parts:
            raise ValueError(
                f"its kernel {kernel.shape} has out_sharding {spec}, but mesh axis {entry!r} has {parts} devices, "
                f"which do not divide {size}: choose a mesh that does, or leave the axis whole"
            )


def _mesh_metadata(kernel: nnx.Variable) -> dict[str, Any]:
    return {name: kernel.get_metadata()[name] for name in ("sharding_rules", "mesh") if name in kernel.get_metadata()}
