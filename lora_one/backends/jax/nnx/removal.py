"""LoRA out of an NNX model, in place: ours, flax's own and qwix's, with the factors in the kernels or without."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from lora_one.backends.jax.sites import check_concrete
from lora_one.config import Config
from lora_one.errors import ModelError

from .adopt import Found, find_adapters
from .binding import Injected, take_out
from .layers import adapted_kind, kind_of
from .qwix import QWIX_ATTRIBUTES, plain_class


class _Removal(NamedTuple):
    """How one layer gets rid of its LoRA."""

    layer: Any  # that holds the kernel
    param: str
    delta: Callable[[], Array]  # what the factors add to the kernel
    clean: Callable[[], None]  # takes the factors out


def remove(model: nnx.Module, merge: bool) -> nnx.Module:
    """Plain layers again. A kernel that another layer has too is untied: only the layer with LoRA changes.

    Raises:
        ModelError: no LoRA, or LoRA that cannot be merged; the model is as it was.
    """
    found = find_adapters(model, Config())
    if not found:
        raise ModelError(
            f"there is no LoRA in this {type(model).__name__}: expected a model that init or load returned"
        )
    removals, problems = [], []
    for one in found:
        try:
            removals.append(_removal(model, one))
        except ValueError as error:
            problems.append(f"{one.site.name}: {error}")
    if problems and merge:
        raise ModelError("LoRA of these layers cannot be merged:\n  " + "\n  ".join(problems))
    if problems:
        raise ModelError("LoRA of these layers cannot be taken out:\n  " + "\n  ".join(problems))
    if merge:
        owners = _owners(model)
        kernels = [getattr(r.layer, r.param) for r in removals]
        check_concrete("merge", [kernel.get_raw_value() for kernel in kernels], traced=True)
        sums = [_sum(kernel.get_raw_value(), r.delta()) for kernel, r in zip(kernels, removals, strict=True)]
        for removal, kernel, value in zip(removals, kernels, sums, strict=True):
            if owners[id(kernel)] > 1:
                setattr(removal.layer, removal.param, kernel.replace(value))
            else:
                kernel.set_raw_value(value)
    for removal in removals:
        removal.clean()
    return _without_qwix(model)


def _removal(model: nnx.Module, found: Found) -> _Removal:
    """Raises ValueError where the layer under the factors is not known."""
    layer = _at(model, found.a_path[:-1])
    a, b, scale = found.a, found.b, found.site.native
    known = adapted_kind(layer)
    if known is not None:
        plain, kind = known
        names = [f"{kind.param}_lora_{part}" for part in ("a", "b", "scale")]
        delta = _product(layer, kind.layout, a, b, scale)
        return _Removal(layer, kind.param, delta, lambda: take_out([Injected(layer, plain, names)]))
    if isinstance(layer, nnx.LoRA):
        return _of_flax(model, found, layer)
    param = found.a_path[-1].removesuffix("_lora_a")
    kernel = getattr(layer, param)
    under = kind_of(layer)
    if not isinstance(kernel, nnx.Variable) or under is None or under.param != param:
        what = "is quantised" if not isinstance(kernel, nnx.Variable) else f"belongs to a {type(layer).__name__}"
        raise ValueError(f"its {param} {what}: keep the adapter beside it, and save that")
    names = [name for name in vars(layer) if name.startswith(f"{param}_lora_")]

    def clean() -> None:
        for name in names:
            delattr(layer, name)

    return _Removal(layer, param, _product(layer, under.layout, a, b, scale), clean)


def _of_flax(model: nnx.Module, found: Found, lora: nnx.LoRA) -> _Removal:
    if lora.base_module is None:
        holder = _at(model, found.a_path[:-2]) if len(found.a_path) > 1 else None
        if type(holder) is not nnx.LoRALinear:
            raise ValueError("it wraps no layer, so there is no kernel to add it to: keep it")

        def clean() -> None:
            delattr(holder, "lora")
            object.__setattr__(holder, "__class__", nnx.Linear)

        return _Removal(holder, "kernel", lambda: _wide(found.a) @ _wide(found.b), clean)
    base = lora.base_module
    if type(base) is not nnx.Linear:
        raise ValueError(f"it wraps a {type(base).__name__}, expected an nnx.Linear: keep it")

    def become_base() -> None:  # whoever holds the wrapper now holds the layer
        state = vars(lora)["_pytree__state"]
        vars(lora).clear()
        vars(lora).update({**vars(base), "_pytree__state": state})
        object.__setattr__(lora, "__class__", type(base))

    return _Removal(base, "kernel", lambda: _wide(found.a) @ _wide(found.b), become_base)


def _product(layer: Any, layout: Callable[[Any], Any], a: Any, b: Any, scale: float) -> Callable[[], Array]:
    return lambda: scale * layout(layer).product(a[...], b[...])


def _wide(factor: Any) -> Array:
    return factor[...].astype(jnp.promote_types(factor.dtype, jnp.float32))


def _sum(kernel: Array, delta: Array) -> Array:
    return (kernel.astype(delta.dtype) + delta).astype(kernel.dtype)


def _at(model: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        model = model[key] if isinstance(key, int) else getattr(model, key)
    return model


def _owners(model: nnx.Module) -> dict[int, int]:
    """In how many modules each variable is."""
    counts: dict[int, int] = {}
    for _, module in nnx.iter_modules(model):
        for value in vars(module).values():
            if isinstance(value, nnx.Variable):
                counts[id(value)] = counts.get(id(value), 0) + 1
    return counts


def _without_qwix(model: nnx.Module) -> nnx.Module:
    """The model under its own class: qwix's would make new factors at the next call."""
    plain = plain_class(model)
    if plain is not None:
        object.__setattr__(model, "__class__", plain)
        for _, module in nnx.iter_modules(model):
            for name in QWIX_ATTRIBUTES:
                if hasattr(module, name):
                    delattr(module, name)
    return model
