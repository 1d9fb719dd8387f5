"""LoRA that is in an NNX model: ours, nnx.LoRA, nnx.LoRALinear, and what qwix.apply_lora_to_model makes."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lora_one.backends.jax.layout import Layout, plain_layout
from lora_one.backends.jax.sites import Site, kernel_sharding
from lora_one.config import Config
from lora_one.errors import ModelError

from .layers import adapted_kind
from .qwix import QWIX_PATH, qwix_scale


@dataclass(frozen=True)
class Found:
    """A LoRA pair in a model, and how to get at it."""

    site: Site
    a: nnx.Variable
    b: nnx.Variable
    a_path: tuple[Any, ...]
    b_path: tuple[Any, ...]


def find_adapters(model: nnx.Module, config: Config) -> list[Found]:
    """All LoRA pairs of a model, in its own order; empty if it has none.

    Raises:
        ModelError: LoRA of a kind that cannot be started, with the reason.
    """
    found, problems = [], []
    for path, module in nnx.iter_graph(model):
        try:
            if isinstance(module, nnx.LoRA):
                found.append(_of_flax(path, module, config))
            elif adapted_kind(module) is not None:
                found.append(_of_ours(path, module))
            elif isinstance(module, nnx.Module):
                names = [name for name, value in vars(module).items() if isinstance(value, nnx.LoRAParam)]
                for name in names:
                    if name.endswith("_lora_a"):
                        found.append(_of_qwix(model, path, module, name.removesuffix("_lora_a")))
                    elif not name.endswith("_lora_b"):
                        raise ValueError(f"nnx.LoRAParam {name!r} belongs to no layer that is known")
        except ValueError as error:
            problems.append(f"{_dotted(path)}: {error}")
    if problems:
        raise ModelError("the model has LoRA that cannot be started:\n  " + "\n  ".join(problems))
    return found


def _of_ours(path: tuple[Any, ...], layer: Any) -> Found:
    known = adapted_kind(layer)
    assert known is not None
    kind = known[1]
    a, b = (getattr(layer, f"{kind.param}_lora_{side}") for side in "ab")
    scale = getattr(layer, f"{kind.param}_lora_scale")
    kernel = getattr(layer, kind.param)
    site = Site(
        name=_dotted(path),
        layout=kind.layout(layer),
        rank=a.shape[-1],
        scaling=scale,
        native=scale,
        width=None,
        dtype=a.dtype,
        sharding=kernel_sharding(kernel.get_raw_value()),
    )
    return Found(site, a, b, (*path, f"{kind.param}_lora_a"), (*path, f"{kind.param}_lora_b"))


def _of_flax(path: tuple[Any, ...], module: nnx.LoRA, config: Config) -> Found:
    """nnx.LoRA multiplies by 1: the scale of the spec is folded into lora_b."""
    *stack, in_features, rank = module.lora_a.shape
    out_features = module.lora_b.shape[-1]
    name = path[:-1] if path and path[-1] == "lora" and module.base_module is None else path
    scaling = config.alpha / (rank**0.5 if config.use_rslora else rank)
    layout = plain_layout((*stack, in_features, out_features), 1, 1)
    kernel = getattr(module.base_module, "kernel", None)
    site = Site(
        name=_dotted(name),
        layout=layout,
        rank=rank,
        scaling=scaling,
        native=1.0,
        width=None,
        dtype=module.lora_a.dtype,
        sharding=None if kernel is None else kernel_sharding(kernel.get_raw_value()),
    )
    return Found(site, module.lora_a, module.lora_b, (*path, "lora_a"), (*path, "lora_b"))


def _of_qwix(model: nnx.Module, path: tuple[Any, ...], layer: Any, param: str) -> Found:
    """qwix fixes the rank by its rule, and folds the axes of the input, or of the output, or neither."""
    a, b = getattr(layer, f"{param}_lora_a"), getattr(layer, f"{param}_lora_b", None)
    if b is None:
        raise ValueError(f"{param}_lora_a is there without {param}_lora_b")
    if not hasattr(layer, QWIX_PATH):
        raise ValueError(f"{param}_lora_a is on a {type(layer).__name__}, which is neither ours nor qwix's")
    rank = a.shape[-1]
    if b.shape[0] != rank:
        raise ValueError(f"factors {a.shape} and {b.shape} share an axis with the batch; one pair a layer is expected")
    ins, outs = a.shape[:-1], b.shape[1:]
    scale = qwix_scale(model, path, rank)
    site = Site(
        name=_dotted(path),
        layout=Layout((*ins, *outs), (), tuple(range(len(ins))), tuple(range(len(ins), len(ins) + len(outs)))),
        rank=rank,
        scaling=scale,
        native=scale,
        width=rank,
        dtype=jnp.dtype(a.dtype),
        sharding=None,
    )
    return Found(site, a, b, (*path, f"{param}_lora_a"), (*path, f"{param}_lora_b"))


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
