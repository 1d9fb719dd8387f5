"""Adapters of JAX models on disk: in PEFT's format, with the model's own paths as names."""

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lora_one.checkpoint.adapter import LINEAR, Adapter, LoraLayer
from lora_one.checkpoint.folder import CONFIG, WEIGHTS
from lora_one.checkpoint.peft import AdapterFolder, read_adapter, read_folder, write_peft
from lora_one.checkpoint.tensors import STORED_NAMES
from lora_one.config import Config
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError, ModelError

from .fit import fit_problems
from .forms import forms_of, in_flaxs_order, in_pefts_order
from .llama.model import LlamaForCausalLM
from .nnx.adopt import find_adapters
from .nnx.dora_files import dora_problems, from_layers, to_tensors
from .nnx.inject import dropout_of, inject, linear_layers, take_out, train_dropout
from .nnx.layers import adapted_kind, kind_of
from .nnx.removal import remove
from .nnx.whole import parameters, train_whole
from .processes import Processes
from .sites import Leaves, Site, check_concrete
from .trees.binding import adapted_weights, ranks, tree_sites
from .trees.linear import Linear, find_layers
from .trees.linen_files import fresh_layers, note_of, read_note
from .trees.models import LinenModel, PytreeModel, merged
from .trees.whole import as_entries
from .whole import from_folder, whole_tensors


class _SiteFactors(NamedTuple):
    """LoRA that is in a model."""

    site: Site
    leaves: Leaves
    magnitudes: Any = None  # DoRA's, (stack..., out...)


def merge(model: Any) -> Any:
    """See `lora_one.merge`. An NNX model is changed in place; a `LinenModel` or `PytreeModel` is a new one."""
    with Processes("lora_one.merge", model).together():
        if isinstance(model, nnx.Module):
            return remove(model, merge=True)
        check_concrete("merge", model, traced=True)
        return merged(model)


def unload(model: Any) -> Any:
    """Take LoRA out of a model and leave the base weights as they are.

    Use it to get the base model back, for instance after saving the adapter; `lora_one.merge` adds the adapter to the
    weights instead. An NNX model is changed in place, with the paths and classes that it had before `init` or `load`.
    A `LinenModel` or `PytreeModel` is returned anew.

    Args:
        model: a JAX model with LoRA: of `init` or `load`, or with nnx.LoRALinear or qwix layers.

    Returns:
        The model without LoRA.

    Raises:
        ModelError: an NNX model without LoRA, or with LoRA that wraps something other than a linear layer.

    Example:
        >>> from flax import nnx
        >>> import lora_one
        >>> from lora_one.backends.jax import attach_plain, unload
        >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        >>> adapted = attach_plain(model, lora_one.Config(rank=2))
        >>> type(unload(adapted).layers[0]).__name__
        'Linear'
    """
    return remove(model, merge=False) if isinstance(model, nnx.Module) else model.replace(lora={}, layouts=())


@contextmanager
def one_writer(model: Any, path: Path) -> Iterator[Adapter | None]:
    """Yield the adapter in the process that writes it into a folder, and wait until it is written.

    A model that is spread over several processes is saved by all of them together. Of those of one machine that name
    the same folder, the first to come writes it.
    """
    processes = Processes("lora_one.save", model)
    with processes.together():
        adapter = _adapter(model)  # all of them gather it, before one may fail to write
        yield adapter if processes.is_first(f"{socket.gethostname()} {path.absolute()}") else None
        processes.count()


def save(model: Any, path: Path) -> None:
    """See `lora_one.save`. Llama-family models have PEFT's names; a scanned stack is written layer by layer.

    Args:
        model: the model, or its adapter.
        path: an empty folder.
    """
    write_peft(path, model if isinstance(model, Adapter) else _adapter(model))


def _adapter(model: Any) -> Adapter:
    """Return a model's adapter, whole. Every process of those that the model is spread over must call it."""
    lora = _find_lora(model)
    if not lora:
        raise ModelError(
            f"save needs a model with LoRA layers, as lora_one.init returns it, got {type(model).__name__}"
        )
    check_concrete("save", [(leaves, m) for _, leaves, m in lora])
    forms = forms_of(model, [site for site, *_ in lora])
    layers = {}
    for site, leaves, m in lora:
        for layer, pair, vector in zip(site.layers(), site.spec_pairs(leaves), to_tensors(site, m), strict=True):
            form, dtype = forms.get(layer.name, LINEAR), STORED_NAMES[leaves.a.dtype.name]
            factors = in_pefts_order(_to_numpy(pair), form)
            layers[layer.name] = LoraLayer([factors], layer.scaling, dtype, form=form, magnitude=vector)
    task = "CAUSAL_LM" if isinstance(model, LlamaForCausalLM) else None
    whole = whole_tensors(model)
    modules = tuple(dict.fromkeys(path.rpartition(".")[0] for path in whole))
    if isinstance(model, LinenModel):
        note = note_of({site.name: site.layout for site, *_ in lora})
        return Adapter(layers, model.dropout, task, note, modules, whole)
    moved = {site.name: site.layout for site, *_ in lora if any(site.layout.lifts)}
    dropout = dropout_of(model) if isinstance(model, nnx.Module) else 0.0
    return Adapter(layers, dropout, task, note_of(moved) if moved else {}, modules, whole)


def load(model: Any, path: Path, trainable: bool) -> Any:
    """See `lora_one.load`. An NNX model gets its layers in place; `wrt=nnx.LoRAParam` says what trains."""
    processes = Processes("lora_one.load", model)
    with processes.together():
        folder = read_folder(path)
        if processes.size > 1 and not processes.agree(_fingerprint(path)):
            raise CheckpointError(f"the adapter in {path} must be the same in all processes, got another one in some")
        return _load(model, path, folder, trainable)


def _load(model: Any, path: Path, folder: AdapterFolder, trainable: bool) -> Any:
    own_lora = _find_lora(model)
    own_sites = {site.name: site for site, *_ in own_lora}
    linear, problems = ({}, []) if isinstance(model, nnx.Module) else _tree_layers(model, folder)
    if not problems:
        sites = own_sites or _possible_sites(model, linear)
        problems = fit_problems(model, folder, sites, has_lora=bool(own_sites))
        problems += dora_problems(folder.use_dora, own_lora, isinstance(model, nnx.Module))
    if problems:
        raise CheckpointError(f"the adapter in {path} does not fit the model", problems)
    adapter = read_adapter(folder)
    factors = {name: layer.pairs[0] for name, layer in adapter.layers.items()}
    whole = from_folder(model, adapter.whole)
    plan = {}
    for name, site in sites.items():
        first = site.layers()[0].name
        if first in factors:
            plan[name] = folder.lora_A[first][0], folder.scalings[first]
    if isinstance(model, nnx.Module):
        return _load_nnx(model, folder, adapter, {} if own_sites else plan, whole, trainable)
    sites = own_sites or tree_sites(linear, plan)
    # One scale for all layers: the ratio of a layer's own scale to it goes into lora_b.
    scaling = model.scaling if own_sites else next(iter(plan.values()))[1]
    sites = {name: replace(site, scaling=scaling, native=scaling) for name, site in sites.items()}
    weights = adapted_weights(sites, linear)
    lora = {
        weight.layer: weight.to_lora(site.trained(_pairs(site, folder, factors)))
        for weight, site in zip(weights, sites.values(), strict=True)
    }
    new = model.replace(lora=lora | as_entries(whole), scaling=scaling, layouts=weights)
    return new.replace(dropout=_dropout(folder)) if isinstance(model, LinenModel) and not own_sites else new


def _dropout(folder: AdapterFolder) -> float:
    return float(folder.config.get("lora_dropout") or 0.0)


def _fingerprint(folder: Path) -> str:
    digests = []
    for name in (CONFIG, WEIGHTS):
        with open(folder / name, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)


def _load_nnx(
    model: nnx.Module,
    folder: AdapterFolder,
    adapter: Adapter,
    plan: dict[str, tuple[int, float]],
    whole: dict[str, Array],
    trainable: bool,
) -> nnx.Module:
    """Inject LoRA as planned, and put the folder's factors and whole parameters into the model."""
    factors = {name: layer.pairs[0] for name, layer in adapter.layers.items()}
    lifts = {name: layout.lifts for name, layout in read_note(folder).items() if name in plan}
    injected = inject(model, plan, _dropout(folder), lifts=lifts, dora=folder.use_dora)
    try:
        layers = find_adapters(model, Config())
        leaves = [layer.site.trained(_pairs(layer.site, folder, factors)) for layer in layers]
    except BaseException:
        take_out(injected)
        raise
    for layer, values in zip(layers, leaves, strict=True):
        layer.write(*values)
        if layer.m is not None:
            layer.write_magnitudes(from_layers(layer.site, adapter.layers))
    variables = parameters(model)
    for name, value in whole.items():
        variables[name].set_raw_value(value)
    train_whole(variables[name] for name in whole)
    train_dropout(model, trainable)
    return model


def _to_numpy(pair: Factors) -> Factors:
    wide = np.float64 if pair.lora_A.dtype == jnp.float64 else np.float32  # NumPy has no bfloat16
    return Factors(*(np.asarray(factor, wide) for factor in pair))


def _pairs(site: Site, folder: AdapterFolder, factors: dict[str, Factors]) -> list[Factors]:
    """Return the folder's pairs of a site, with the ratio of the folder's scale to the site's in lora_B."""
    pairs = []
    for layer in site.layers():
        a, b = in_flaxs_order(factors[layer.name], folder.forms.get(layer.name, LINEAR))
        ratio = folder.scalings[layer.name] / site.scaling
        pairs.append(Factors(jnp.asarray(a), jnp.asarray(b if ratio == 1.0 else b * np.float32(ratio))))
    return pairs


def _find_lora(model: Any) -> list[_SiteFactors]:
    if isinstance(model, nnx.Module):
        layers = find_adapters(model, Config())
        return [_SiteFactors(x.site, x.leaves, None if x.m is None else x.m.get_raw_value()) for x in layers]
    if not isinstance(model, (LinenModel, PytreeModel)):
        raise ModelError(f"the model must be a flax.nnx.Module, LinenModel or PytreeModel, got {type(model).__name__}")
    weights = {weight.layer: weight for weight in model.layouts}
    leaves = {name: weight.leaves(model.lora) for name, weight in weights.items() if name in model.lora}
    linear = find_layers(model) if leaves else {}
    sites = tree_sites(linear, {name: (rank, model.scaling) for name, rank in ranks(model).items()})
    return [_SiteFactors(site, leaves[name]) for name, site in sites.items()]


def _tree_layers(model: LinenModel | PytreeModel, folder: AdapterFolder) -> tuple[Linear, list[str]]:
    """Return the linear layers of a model that is a value, and problems with those that the folder names."""
    if isinstance(model, LinenModel) and not model.layouts:
        return fresh_layers(model, folder)
    return find_layers(model), []


def _possible_sites(model: Any, linear: Linear) -> dict[str, Site]:
    """Return a site of rank 1 for each layer that LoRA could go to: for its names and shapes."""
    if not isinstance(model, nnx.Module):
        return tree_sites(linear, dict.fromkeys(linear, (1, 1.0)))
    sites = {}
    for name, layer in linear_layers(model).items():
        try:
            adapted = adapted_kind(layer)
            kind = kind_of(layer) if adapted is None else adapted[1]
            if kind is not None:
                sites[name] = Site(name, kind.layout(layer), 1, 1.0, 1.0, None, jnp.float32, None)
        except ValueError:  # a layer that cannot be adapted: the folder must not name it
            continue
    return sites
