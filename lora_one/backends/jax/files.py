"""Adapters of JAX models on disk: in PEFT's format, with the model's own paths as names."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_one.checkpoint.adapter import Adapter, LoraLayer
from lora_one.checkpoint.peft import AdapterFolder, check_folder, read_adapter, read_folder, write_peft
from lora_one.checkpoint.plain_lora import setting_problems
from lora_one.checkpoint.tensors import STORED_NAMES
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError, ModelError

from .llama.model import LlamaForCausalLM
from .nnx.adopt import find_adapters
from .nnx.binding import inject, linear_layers, take_out
from .nnx.layers import adapted_kind, kind_of
from .nnx.removal import remove
from .sites import Leaves, Site, check_concrete
from .trees.binding import Linear, find_layers, tree_sites
from .trees.linen_files import fresh_layers, note_of
from .trees.models import LinenModel, PytreeModel, merged


class _Held(NamedTuple):
    """LoRA that is in a model."""

    site: Site
    leaves: Leaves


def merge(model: Any) -> Any:
    """See `lora_one.merge`. An NNX model is changed in place; a `LinenModel` or `PytreeModel` is a new one."""
    if isinstance(model, nnx.Module):
        return remove(model, merge=True)
    check_concrete("merge", model, traced=True)
    return merged(model)


def unload(model: Any) -> Any:
    """Take LoRA out and leave the base as it is. An NNX model is changed in place."""
    return remove(model, merge=False) if isinstance(model, nnx.Module) else model.replace(lora={}, layouts=())


def save(model: Any, path: Path) -> None:
    """See `lora_one.save`. Llama-family models have PEFT's names; a scanned stack is written layer by layer."""
    held = _held(model)
    if not held:
        raise ModelError(
            f"save needs a model with LoRA layers, as lora_one.init returns it, got {type(model).__name__}"
        )
    check_concrete("save", [leaves for _, leaves in held])
    layers = {
        layer.name: LoraLayer([_to_numpy(pair)], layer.scaling, STORED_NAMES[leaves.a.dtype.name])
        for site, leaves in held
        for layer, pair in zip(site.layers(), site.spec_pairs(leaves), strict=True)
    }
    task = "CAUSAL_LM" if isinstance(model, LlamaForCausalLM) else None
    write_peft(path, Adapter(layers, task=task, notes=note_of(model) if isinstance(model, LinenModel) else {}))


def load(model: Any, path: Path, trainable: bool) -> Any:
    """See `lora_one.load`. An NNX model gets its layers in place; `wrt=nnx.LoRAParam` says what trains."""
    folder = read_folder(path)
    held = {site.name: site for site, _ in _held(model)}
    layers_of, unknown = ({}, []) if isinstance(model, nnx.Module) else _tree_layers(model, folder)
    if unknown:
        raise CheckpointError(f"the adapter in {path} does not fit the model", unknown)
    stacks = {name: site.layers() for name, site in (held or _plain_sites(model, layers_of)).items()}
    linear = {layer.name: (layer.out_features, layer.in_features) for layers in stacks.values() for layer in layers}
    problems = setting_problems(folder.config) + check_folder(folder, linear) or _stack_problems(folder, stacks)
    if held and not problems:
        problems = [
            f"{layer.name}: the model has rank {layer.rank}, the file "
            f"{folder.lora_A[layer.name][0] if layer.name in folder.lora_A else 'none'}"
            for layers in stacks.values()
            for layer in layers
            if folder.lora_A.get(layer.name, (None,))[0] != layer.rank
        ]
    if problems:
        raise CheckpointError(f"the adapter in {path} does not fit the model", problems)
    factors = {name: layer.pairs[0] for name, layer in read_adapter(folder).layers.items()}
    chosen = [name for name, layers in stacks.items() if layers[0].name in factors]
    plan = {
        name: (folder.lora_A[first][0], folder.scalings[first]) for name in chosen for first in [stacks[name][0].name]
    }
    if isinstance(model, nnx.Module):
        return _load_nnx(model, folder, factors, plan, bool(held))
    sites = held or tree_sites(layers_of, plan)
    # One scale for all: what differs from it goes into lora_b.
    scaling = model.scaling if held else next(iter(plan.values()))[1]
    sites = {name: replace(site, scaling=scaling, native=scaling) for name, site in sites.items()}
    params = {name: param for name, (param, _, _) in layers_of.items()}
    lora = {}
    for name, site in sites.items():
        leaves = site.trained(_pairs(site, folder, factors))
        lora[name] = {f"{params[name]}_lora_a": leaves.a, f"{params[name]}_lora_b": leaves.b}
    layouts = tuple((name, params[name], site.layout) for name, site in sites.items())
    return model.replace(lora=lora, scaling=scaling, layouts=layouts)


def _load_nnx(
    model: nnx.Module,
    folder: AdapterFolder,
    factors: dict[str, Factors],
    plan: dict[str, tuple[int, float]],
    has_lora: bool,
) -> nnx.Module:
    injected = [] if has_lora else inject(model, plan)
    try:
        found = find_adapters(model, Config())
        values = [(f, f.site.trained(_pairs(f.site, folder, factors))) for f in found]
    except BaseException:
        take_out(injected)
        raise
    for f, leaves in values:
        f.a.set_raw_value(leaves.a)
        f.b.set_raw_value(leaves.b)
    return model


def _to_numpy(pair: Factors) -> Factors:
    wide = np.float64 if pair.lora_A.dtype == jnp.float64 else np.float32  # NumPy has no bfloat16
    return Factors(*(np.asarray(factor, wide) for factor in pair))


def _pairs(site: Site, folder: AdapterFolder, factors: dict[str, Factors]) -> list[Factors]:
    """The folder's pairs of a site, with the difference between its scale and the site's in lora_B."""
    pairs = []
    for layer in site.layers():
        a, b = factors[layer.name]
        ratio = folder.scalings[layer.name] / site.scaling
        pairs.append(Factors(jnp.asarray(a), jnp.asarray(b if ratio == 1.0 else b * np.float32(ratio))))
    return pairs


def _stack_problems(folder: AdapterFolder, stacks: dict[str, list[Any]]) -> list[str]:
    problems = []
    for name, layers in stacks.items():
        ranks = {folder.lora_A[layer.name][0] if layer.name in folder.lora_A else None for layer in layers}
        if len(ranks) > 1:
            problems.append(
                f"{name}: its {len(layers)} stacked layers must have one rank, got {sorted(map(str, ranks))}"
            )
    return problems


def _held(model: Any) -> list[_Held]:
    if isinstance(model, nnx.Module):
        found = find_adapters(model, Config())
        return [_Held(f.site, Leaves(f.a.get_raw_value(), f.b.get_raw_value())) for f in found]
    if not isinstance(model, (LinenModel, PytreeModel)):
        raise ModelError(f"the model must be a flax.nnx.Module, LinenModel or PytreeModel, got {type(model).__name__}")
    params = {name: param for name, param, _ in model.layouts}
    leaves = {name: Leaves(f[f"{params[name]}_lora_a"], f[f"{params[name]}_lora_b"]) for name, f in model.lora.items()}
    linear = find_layers(model, (), None) if leaves else {}
    sites = tree_sites(linear, {name: (x.a.shape[-1], model.scaling) for name, x in leaves.items()})
    return [_Held(site, leaves[name]) for name, site in sites.items()]


def _tree_layers(model: LinenModel | PytreeModel, folder: AdapterFolder) -> tuple[Linear, list[str]]:
    """The linear layers of a model that is a value, and problems with those that the folder names."""
    if isinstance(model, LinenModel) and not model.layouts:
        return fresh_layers(model, folder)
    return find_layers(model, (), None), []


def _plain_sites(model: Any, layers_of: Linear) -> dict[str, Site]:
    """A site, of rank 1, for each layer that LoRA could go to: for its names and shapes."""
    if not isinstance(model, nnx.Module):
        return tree_sites(layers_of, dict.fromkeys(layers_of, (1, 1.0)))
    sites = {}
    for name, layer in linear_layers(model).items():
        try:
            known = adapted_kind(layer)
            kind = kind_of(layer) if known is None else known[1]
            if kind is not None:
                sites[name] = Site(name, kind.layout(layer), 1, 1.0, 1.0, None, jnp.float32, None)
        except ValueError:  # a layer that cannot be adapted: the folder must not name it
            continue
    return sites
