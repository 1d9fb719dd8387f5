"""Take LoRA out of an NNX model, in place: ours, flax's own and qwix's, after adding it to the kernels or without.

Merged kernels are floating-point, also where qwix had quantised them: its class is gone then, which alone reads these.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
from jax import Array

from lora_one.backends.jax.layout import Layout
from lora_one.backends.jax.sites import check_concrete
from lora_one.checks import shown_names
from lora_one.config import Config
from lora_one.errors import ModelError

from .adopt import AdaptedLayer, Path, find_adapters
from .dora import effective_kernel
from .inject import Injected, take_out
from .layers import adapted_kind, kind_of
from .qwix import QWIX_ATTRIBUTES, dequantise, is_quantised, plain_class
from .whole import forget_whole, whole_parameters


class _Removal(NamedTuple):
    """The steps that free one layer from its LoRA."""

    layer: Any  # holds the kernel
    param: str
    added: Callable[[Array], Array]  # the kernel -> the kernel with the factors' product
    clean: Callable[[], None]  # takes the factors out


def remove(model: nnx.Module, merge: bool) -> nnx.Module:
    """Make all layers plain again. A kernel that two layers share is untied: only the layer with LoRA changes.

    Raises:
        ModelError: no LoRA, or LoRA that cannot be taken out or merged; then the model is unchanged.
    """
    layers = find_adapters(model, Config())
    if not layers:
        raise ModelError(
            f"there is no LoRA in this {type(model).__name__}: expected a model that init or load returned"
        )
    removals, problems = [], []
    for layer in layers:
        try:
            removals.append(_removal(model, layer, merge))
        except ValueError as error:
            problems.append(f"{layer.site.name}: {error}")
    whole = whole_parameters(model)
    if whole and not merge:
        raise ModelError(
            f"{shown_names(list(whole))} were trained whole, in place of the base weights: merge keeps them; for the "
            "base model load its weights again"
        )
    if problems and merge:
        raise ModelError("LoRA of these layers cannot be merged:\n  " + "\n  ".join(problems))
    if problems:
        raise ModelError("LoRA of these layers cannot be taken out:\n  " + "\n  ".join(problems))
    if merge:
        check_concrete("merge", nnx.state(model), traced=True)
        dequantise(model)
        _merge(model, removals)
    for removal in removals:
        removal.clean()
    forget_whole(whole.values())
    return _without_qwix(model)


def _merge(model: nnx.Module, removals: list[_Removal]) -> None:
    owners = _owners(model)
    kernels = [getattr(removal.layer, removal.param) for removal in removals]
    sums = [removal.added(kernel.get_raw_value()) for removal, kernel in zip(removals, kernels, strict=True)]
    for removal, kernel, value in zip(removals, kernels, sums, strict=True):
        if owners[id(kernel)] > 1:
            setattr(removal.layer, removal.param, kernel.replace(value))
        else:
            kernel.set_raw_value(value)


def _removal(model: nnx.Module, adapted: AdaptedLayer, merge: bool) -> _Removal:
    """Return the steps for one layer; raise ValueError where the layer under the factors is unknown."""
    layer = _at(model, adapted.a_path[:-1])
    known = adapted_kind(layer)
    if known is not None:
        plain, kind = known
        names = [name for name in vars(layer) if name.startswith(f"{kind.param}_lora_")]
        return _Removal(
            layer,
            kind.param,
            _added(adapted, lambda: adapted.site.layout),
            lambda: take_out([Injected(layer, plain, names)]),
        )
    if isinstance(layer, nnx.LoRA):
        return _flax_removal(model, adapted, layer)
    param = adapted.a_path[-1].removesuffix("_lora_a")
    kernel = getattr(layer, param)
    under = kind_of(layer)
    if is_quantised(kernel) and not merge:
        raise ValueError(f"its {param} is quantised, and without qwix the layer cannot read it: merge makes it float")
    if under is None or under.param != param:
        raise ValueError(f"its {param} belongs to a {type(layer).__name__}: keep the adapter beside it, and save that")
    names = [name for name in vars(layer) if name.startswith(f"{param}_lora_")]

    def clean() -> None:
        for name in names:
            delattr(layer, name)

    # qwix may fold axes of the factors, so the layer's own layout is used. Only a merge asks for it: it may raise.
    return _Removal(layer, param, _added(adapted, lambda: under.layout(layer)), clean)


def _flax_removal(model: nnx.Module, adapted: AdaptedLayer, lora: nnx.LoRA) -> _Removal:
    """Return the steps for an nnx.LoRALinear, or for an nnx.LoRA around a linear layer."""
    if lora.base_module is None:
        holder = _at(model, adapted.a_path[:-2]) if len(adapted.a_path) > 1 else None
        if type(holder) is not nnx.LoRALinear:
            raise ValueError("it wraps no layer, so there is no kernel to add it to: keep it")

        def clean() -> None:
            delattr(holder, "lora")
            object.__setattr__(holder, "__class__", nnx.Linear)

        return _Removal(holder, "kernel", _added(adapted, lambda: adapted.site.layout), clean)
    base = lora.base_module
    kind = kind_of(base)
    if kind is None:
        raise ValueError(f"it wraps a {type(base).__name__}, expected a linear layer: keep it")
    added = _added(adapted, lambda: kind.layout(base))

    def become_base() -> None:  # every attribute that holds the wrapper then holds the layer
        state = vars(lora)["_pytree__state"]
        vars(lora).clear()
        vars(lora).update({**vars(base), "_pytree__state": state})
        object.__setattr__(lora, "__class__", type(base))

    return _Removal(base, kind.param, added, become_base)


def _added(adapted: AdaptedLayer, layout: Callable[[], Layout]) -> Callable[[Array], Array]:
    def added(kernel: Array) -> Array:
        a, b, scale = adapted.a[...], adapted.b[...], adapted.site.native
        if adapted.m is None:
            return layout().added(kernel, a, b, scale)
        return effective_kernel(layout(), kernel, a, b, scale, adapted.m[...])

    return added


def _at(model: Any, path: Path) -> Any:
    for key in path:
        model = model[key] if isinstance(key, int) else getattr(model, key)
    return model


def _owners(model: nnx.Module) -> dict[int, int]:
    """Return the number of modules that hold each variable, by its id."""
    counts: dict[int, int] = {}
    for _, module in nnx.iter_modules(model):
        for value in vars(module).values():
            if isinstance(value, nnx.Variable):
                counts[id(value)] = counts.get(id(value), 0) + 1
    return counts


def _without_qwix(model: nnx.Module) -> nnx.Module:
    """Return the model under its own class: qwix's class would make new factors at the next call."""
    plain = plain_class(model)
    if plain is not None:
        object.__setattr__(model, "__class__", plain)
        for _, module in nnx.iter_modules(model):
            for name in QWIX_ATTRIBUTES:
                if hasattr(module, name):
                    delattr(module, name)
    return model
