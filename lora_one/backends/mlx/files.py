"""Adapters of MLX models on disk: save them, and load them after checks. What is on disk is NumPy's until here."""

from collections.abc import Collection
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lora_one.checkpoint.adapter import LINEAR, Adapter, Form, LoraLayer
from lora_one.checkpoint.mlx_lm import Shapes, is_mlx_lm, read_mlx_lm, write_mlx_lm
from lora_one.checkpoint.peft import check_folder, read_folder
from lora_one.checkpoint.peft import read_adapter as read_peft
from lora_one.checkpoint.plain_lora import setting_problems
from lora_one.checkpoint.tensors import STORED_NAMES, Tensor
from lora_one.checkpoint.whole import is_within, whole_problems
from lora_one.checks import shown_names
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError, warn_user

from .attach import LORA, Site, attach_layer, find_sites, random_stream_kept
from .dora import is_dora
from .layout import EMBEDDINGS, base_of, dropout_of, is_switch, read_pairs, set_dropout, write_pairs
from .merge import require_sites
from .targets import columns, is_linear
from .tree import Snapshot, flat, places
from .whole import fill_whole, parameter_shapes, train_whole, whole_modules, whole_parameters, whole_tensors

_DTYPES: dict[str, mx.Dtype] = {stored: getattr(mx, dtype) for dtype, stored in STORED_NAMES.items()}


class UnsavedWarning(UserWarning):
    """Trained parameters are no part of a LoRA adapter, and are not in its folder."""


def save(model: nn.Module, path: Path) -> None:
    """See `lora_one.save`. The folder is in mlx-lm's layout and, unless a layer is a mixture of experts, in PEFT's."""
    sites = require_sites(model, "save")
    lora = {f"{site.path}.{name}" for site in sites for name in site.names}
    whole = tuple(whole_modules(model))
    trainable = flat(model.trainable_parameters())
    others = [name for name in trainable if name not in lora and not is_within(name, whole)]
    if others:
        warn_user(
            f"{len(others)} trainable parameters are no LoRA factors and are not saved with the adapter: "
            f"{shown_names(others, 4)}; name their modules in Config(modules_to_save=...), freeze what is not trained, "
            "or save it with model.save_weights",
            UnsavedWarning,
        )
    layers = {site.path: _to_numpy(site) for site in sites}
    dropout = max(dropout_of(site.module) for site in sites)
    adapter = Adapter(layers, dropout, "CAUSAL_LM", modules_to_save=whole, whole=whole_tensors(model))
    # PEFT adds LoRA on an embedding to no tied output layer, and mlx-lm does.
    fits_peft = not (_is_tied(model) and any(layer.form.is_embedding for layer in layers.values()))
    write_mlx_lm(path, adapter, len(getattr(model, "layers", ())), fits_peft)


def load(model: nn.Module, path: Path, trainable: bool) -> nn.Module:
    """See `lora_one.load`. Opens folders that lora-one, mlx-lm or PEFT wrote; attaches in place.

    If the model has LoRA layers already, they get the factors, scale and dropout of the folder. Only the factors, and
    the modules that are trained whole, become frozen or trainable.
    """
    sites = find_sites(model)
    adapter = read_adapter(path, model, whole_parameters(model).keys() if sites else None)
    if sites:
        _check_same({site.path: site for site in sites}, adapter, path)
    snapshot = Snapshot(model)
    try:
        if not sites:
            with random_stream_kept():
                sites = _attach(model, adapter)
        for site in sites:
            _fill(site, adapter.layers[site.path], adapter.dropout)
            site.set_trainable(trainable)
        by_path = {place.path: place.module for place in places(model)}
        whole = whole_modules(model) or {path: by_path[path] for path in adapter.modules_to_save}
        fill_whole(whole, adapter.whole)
        train_whole(whole.values(), trainable)
        mx.eval(model.parameters())
    except BaseException:
        snapshot.restore()
        raise
    snapshot.restore_modes(model)
    return model


def read_adapter(path: Path, model: nn.Module, held: Collection[str] | None) -> Adapter:
    """Read a folder that lora-one, mlx-lm or PEFT wrote.

    Args:
        model: the model that the adapter is for.
        held: the parameters that the model trains whole; None for a model without LoRA.

    Raises:
        CheckpointError: all that is wrong with files, names, ranks and shapes, at once.
    """
    linear, parameters = _linear_shapes(model), parameter_shapes(model)
    if is_mlx_lm(path):
        adapter = read_mlx_lm(path, linear)
        shapes = {name: tensor.array.shape for name, tensor in adapter.whole.items()}
        problems = whole_problems(shapes, adapter.modules_to_save, parameters, held)
    else:
        folder = read_folder(path)
        dense = {name: (shape[0], shape[1]) for name, shape in linear.items() if len(shape) == 2}
        problems = check_folder(folder, dense, parameters, held, _forms(model))
        if _is_tied(model):
            problems += [f"{name}: PEFT adds LoRA on an embedding to no tied output layer, and mlx-lm does" for name in
                         folder.forms]  # fmt: skip
        problems += setting_problems(folder.config, allowed=("modules_to_save",))
        adapter = Adapter({}) if problems else read_peft(folder)
    if problems:
        raise CheckpointError(f"the adapter in {path} does not fit the model", problems)
    return adapter


def _to_numpy(site: Site) -> LoraLayer:
    module, pairs = site.module, [Factors(*map(_tensor, pair)) for pair in read_pairs(site.module)]
    arrays = [Factors(*(tensor.array for tensor in pair)) for pair in pairs]
    form = Form(is_embedding=True) if isinstance(base_of(module), EMBEDDINGS) else LINEAR
    m = _tensor(module.m) if is_dora(module) else None
    return LoraLayer(arrays, float(module.scale), pairs[0].lora_A.dtype, is_switch(module), form, m)


def _tensor(x: mx.array) -> Tensor:
    wide = mx.float64 if x.dtype == mx.float64 else mx.float32  # NumPy has no bfloat16
    return Tensor(np.array(x.astype(wide)), STORED_NAMES[str(x.dtype).removeprefix("mlx.core.")])


def to_mlx(layer: LoraLayer) -> list[Factors]:
    """Return the pairs of a layer as MLX arrays, in the dtype that NumPy holds them in."""
    return [Factors(*(mx.array(np.ascontiguousarray(factor)) for factor in pair)) for pair in layer.pairs]


def _attach(model: nn.Module, adapter: Adapter) -> list[Site]:
    model.freeze()
    by_path = {place.path: place for place in places(model)}
    for name, layer in adapter.layers.items():
        dora = layer.magnitude is not None
        attach_layer(by_path[name], layer.rank, layer.scaling, adapter.dropout, dora)
    return find_sites(model)


def _fill(site: Site, layer: LoraLayer, dropout: float) -> None:
    write_pairs(site.module, to_mlx(layer), _DTYPES[layer.dtype])
    site.module.scale = layer.scaling
    if layer.magnitude is not None:
        array, name = layer.magnitude
        site.module.m = mx.array(array).astype(mx.result_type(site.module.m.dtype, _DTYPES[name]))
    set_dropout(site.module, dropout)


def _check_same(sites: dict[str, Site], adapter: Adapter, path: Path) -> None:
    problems = [f"{name}: the file has LoRA here, the model has none" for name in sorted(adapter.layers.keys() - sites)]
    for name, site in sites.items():
        if name not in adapter.layers:
            problems.append(f"{name}: the model has LoRA here, the file has none")
            continue
        rank, model_rank = adapter.layers[name].rank, site.layers[0].rank
        if rank != model_rank:
            problems.append(f"{name}: the model has rank {model_rank}, the file {rank}")
        in_model, in_file = is_dora(site.module), adapter.layers[name].magnitude is not None
        if in_model != in_file:
            problems.append(f"{name}: {'only the model' if in_model else 'only the file'} has DoRA's magnitudes here")
    if problems:
        raise CheckpointError(f"the adapter in {path} does not fit the model", problems)


def _linear_shapes(model: nn.Module) -> Shapes:
    """Return the shape of every linear layer's weight, quantised or not, with LoRA or without."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in places(model):
        base = base_of(place.module) if isinstance(place.module, LORA) else place.module
        if isinstance(base, EMBEDDINGS):
            shapes[place.path] = columns(base), base.weight.shape[0]
        elif is_linear(base):
            shapes[place.path] = (*base.weight.shape[:-1], columns(base))
    return shapes


def _forms(model: nn.Module) -> dict[str, Form]:
    """Return path -> kind, of the layers that are not linear."""
    modules = ((place.path, place.module) for place in places(model))
    bases = ((path, base_of(module) if isinstance(module, LORA) else module) for path, module in modules)
    return {path: Form(is_embedding=True) for path, base in bases if isinstance(base, EMBEDDINGS)}


def _is_tied(model: nn.Module) -> bool:
    """Return whether a model of mlx-lm uses its embedding as the output layer too."""
    args = getattr(model, "args", None)
    return args is not None and bool(getattr(args, "tie_word_embeddings", False) or "lm_head" not in model)
