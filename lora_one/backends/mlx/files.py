"""Adapters of MLX models: saved, loaded after checks, and merged into the base weights."""

import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from lora_one.checkpoint.adapter import Adapter, LoraLayer
from lora_one.checkpoint.mlx_lm import Shapes, write_mlx_lm
from lora_one.errors import CheckpointError, ModelError

from .attach import Site, attach_layer, find_sites, random_stream_kept
from .folder import read_adapter, stored_dtype, to_layer, to_mlx
from .layout import is_switch, read_pairs, write_pairs
from .merge import Merged, compute_dtype, merged_layer
from .targets import columns, is_linear
from .tree import Snapshot, flat, places

NOTICEABLE = 0.01  # how large, of a layer's s B A, the rounding may be without a word


class RequantizeWarning(UserWarning):
    """Merging rounded the adapter to the grid of the weights: quantised ones, or float ones of few digits."""


class UnsavedWarning(UserWarning):
    """Parameters were trained that are no part of a LoRA adapter, and are not in its folder."""


def save(model: nn.Module, path: Path) -> None:
    """See `lora_one.save`. Written for mlx-lm, and, but for mixtures of experts, for PEFT in the same folder."""
    sites = _require_sites(model, "save")
    lora = {f"{site.path}.{name}" for site in sites for name in ("lora_a", "lora_b")}
    others = [name for name in flat(model.trainable_parameters()) if name not in lora]
    if others:
        shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        warnings.warn(
            f"{len(others)} trainable parameters are no LoRA factors and are not saved with the adapter: {shown}; "
            "freeze what is not trained, or save it with model.save_weights",
            UnsavedWarning,
            stacklevel=3,
        )
    layers = {
        site.path: to_layer(read_pairs(site.module), float(site.module.scale), is_switch(site.module)) for site in sites
    }
    dropout = max(1.0 - site.module.dropout._p_1 for site in sites)
    write_mlx_lm(path, Adapter(layers, dropout, "CAUSAL_LM"), len(getattr(model, "layers", ())))


def load(model: nn.Module, path: Path, trainable: bool) -> nn.Module:
    """See `lora_one.load`. Opens folders that lora-one, mlx-lm or PEFT wrote; attaches in place.

    LoRA layers that are there get the folder's factors, scale and dropout; the frozen state of all that is no factor
    stays.
    """
    sites = find_sites(model)
    adapter = read_adapter(path, _linear_shapes(model))
    if sites:
        _check_same({site.path: site for site in sites}, adapter, path)
    found = Snapshot(model)
    try:
        if not sites:
            with random_stream_kept():
                sites = _attach(model, adapter)
        for site in sites:
            _fill(site, adapter.layers[site.path], adapter.dropout)
            site.set_trainable(trainable)
        mx.eval(model.parameters())
    except BaseException:
        found.restore()
        raise
    found.restore_modes(model)
    return model


def merge(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """See `lora_one.merge`; in place, once all layers are merged.

    Args:
        dequantize: merged layers of a quantised model become float layers, in the dtype that the model computes in. A
            checkpoint saved from it must not say "quantization" in its configuration.

    Warns:
        RequantizeWarning: quantised weights were merged into and quantised again, or float weights are too short, so
            that part of the adapter is lost.
    """
    sites = _require_sites(model, "merge")
    compute = compute_dtype(model)
    with random_stream_kept():
        merged = [merged_layer(site.module, dequantize, compute) for site in sites]
    for site, (layer, _) in zip(sites, merged, strict=True):
        if "weight" in site.module.linear._no_grad:
            layer.freeze()
        layer.train(site.module.training)
        site.place.container[site.place.key] = layer
    _warn_of_losses(sites, merged)
    return model


def _warn_of_losses(sites: list[Site], merged: list[Merged]) -> None:
    rounding = {site.path: one.rounding for site, one in zip(sites, merged, strict=True)}
    requantised = sum("scales" in one.layer for one in merged)
    rounded = [path for path, share in rounding.items() if not share <= NOTICEABLE]  # nan is noticeable too
    worst = max(rounding, key=lambda path: rounding[path])
    most = f"part of it is lost, the rounding is {rounding[worst]:.0%} of it in {worst}"
    if requantised:
        warnings.warn(
            f"the adapter was merged into {requantised} quantised layers, and rounded to their grid: {most}; "
            "merge(model, dequantize=True) makes float layers that hold more of it; or keep the adapter by itself",
            RequantizeWarning,
            stacklevel=4,
        )
    elif rounded:
        dtypes = " and ".join(sorted({str(one.layer.weight.dtype).removeprefix("mlx.core.") for one in merged}))
        warnings.warn(
            f"the adapter was merged into {len(rounded)} layers of {dtypes}, and rounded to it: {most}; "
            "model.set_dtype(mx.float32) before merging keeps all of it; or keep the adapter by itself",
            RequantizeWarning,
            stacklevel=4,
        )


def _attach(model: nn.Module, adapter: Adapter) -> list[Site]:
    model.freeze()
    by_path = {place.path: place for place in places(model)}
    for name, layer in adapter.layers.items():
        attach_layer(by_path[name], layer.rank, layer.scaling, adapter.dropout)
    return find_sites(model)


def _fill(site: Site, layer: LoraLayer, dropout: float) -> None:
    write_pairs(site.module, to_mlx(layer), stored_dtype(layer))
    site.module.scale = layer.scaling
    site.module.dropout._p_1 = 1.0 - dropout


def _check_same(sites: dict[str, Site], adapter: Adapter, path: Path) -> None:
    problems = [f"{name}: the file has LoRA here, the model has none" for name in sorted(adapter.layers.keys() - sites)]
    for name, site in sites.items():
        if name not in adapter.layers:
            problems.append(f"{name}: the model has LoRA here, the file has none")
            continue
        rank, has = adapter.layers[name].rank, site.layers[0].rank
        if rank != has:
            problems.append(f"{name}: the model has rank {has}, the file {rank}")
    if problems:
        raise CheckpointError(f"the adapter in {path} does not fit the model", problems)


def _require_sites(model: nn.Module, verb: str) -> list[Site]:
    sites = find_sites(model)
    if not sites:
        raise ModelError(f"{verb} needs a model with LoRA layers, as lora_one.init returns it, got none in it")
    return sites


def _linear_shapes(model: nn.Module) -> Shapes:
    """The shape of every linear layer's weight, quantised or not, whether LoRA is on it or not."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in places(model):
        adapted = isinstance(place.module, LoRALinear | LoRASwitchLinear)
        base = place.module.linear if adapted else place.module
        if is_linear(base):
            shapes[place.path] = (*base.weight.shape[:-1], columns(base))
    return shapes
