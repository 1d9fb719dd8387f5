"""Merging: the weight of each LoRA layer, as a linear layer of mlx or mlx-lm, and a warning of what its dtype loses.

The sum is in at least float32. mlx-lm's own `fuse` adds in the weight's dtype, which for mxfp4, nvfp4 and mxfp8 is
bfloat16 in any model, and it does not know the scales that nvfp4 gives each expert.
"""

from collections import Counter
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from lora_one.core.dora import effective_weight
from lora_one.core.factors import Factors
from lora_one.errors import ModelError, warn_user

from .attach import Site, find_sites, random_stream_kept
from .dora import is_dora
from .layout import EMBEDDINGS, LoraModule, base_of, read_pairs
from .ops import MlxOps
from .tree import flat
from .whole import forget_whole

_OPS = MlxOps()

NOTICEABLE = 0.01  # size of the rounding relative to a layer's s B A, above which a warning names it


class RequantizeWarning(UserWarning):
    """Merging rounded the adapter to the grid of the weights: they are quantised, or floats with few digits."""


class Merged(NamedTuple):
    """A linear layer that holds the adapter."""

    layer: nn.Module
    rounding: float  # ||rounding error||_F / ||s B A||_F


def merge(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """See `lora_one.merge`; in place, once all layers are merged.

    Args:
        dequantize: whether merged layers of a quantised model become float layers, in the dtype that the model computes
            in. The configuration of a checkpoint saved from such a model must not contain "quantization".

    Warns:
        RequantizeWarning: part of the adapter is lost, since the weights were quantised again, or are floats with too
            few digits.
    """
    sites = require_sites(model, "merge")
    compute = compute_dtype(model)
    with random_stream_kept():
        merged = [merged_layer(site.module, dequantize, compute) for site in sites]
    for site, (layer, _) in zip(sites, merged, strict=True):
        if "weight" in base_of(site.module)._no_grad:
            layer.freeze()
        layer.train(site.module.training)
        site.place.container[site.place.key] = layer
    forget_whole(model)
    _warn_of_losses(sites, merged)
    return model


def require_sites(model: nn.Module, verb: str) -> list[Site]:
    """Return the LoRA layers of a model. Raise ModelError if it has none."""
    sites = find_sites(model)
    if not sites:
        raise ModelError(f"{verb} needs a model with LoRA layers, as lora_one.init returns it, got none in it")
    return sites


def _warn_of_losses(sites: list[Site], merged: list[Merged]) -> None:
    rounding = {site.path: layer.rounding for site, layer in zip(sites, merged, strict=True)}
    requantised = sum("scales" in layer.layer for layer in merged)
    rounded = [path for path, share in rounding.items() if not share <= NOTICEABLE]  # nan is noticeable too
    worst = max(rounding, key=lambda path: rounding[path])
    most = f"part of it is lost, the rounding is {rounding[worst]:.0%} of it in {worst}"
    if requantised:
        warn_user(
            f"the adapter was merged into {requantised} quantised layers, and rounded to their grid: {most}; "
            "merge(model, dequantize=True) makes float layers that hold more of it; or keep the adapter by itself",
            RequantizeWarning,
        )
    elif rounded:
        dtypes = " and ".join(sorted({str(layer.layer.weight.dtype).removeprefix("mlx.core.") for layer in merged}))
        warn_user(
            f"the adapter was merged into {len(rounded)} layers of {dtypes}, and rounded to it: {most}; "
            "model.set_dtype(mx.float32) before merging keeps all of it; or keep the adapter by itself",
            RequantizeWarning,
        )


def merged_layer(module: LoraModule, dequantize: bool, compute: mx.Dtype) -> Merged:
    """Return the linear layer that replaces a LoRA layer.

    Args:
        dequantize: whether a quantised layer becomes a float one.
        compute: the dtype of a float layer, if its quantised weight does not say it.
    """
    base = base_of(module)
    weight = float_weight(base)  # (out, in) or (experts, out, in)
    pairs = [[_OPS.at_least_float32(factor) for factor in pair] for pair in read_pairs(module)]
    if is_dora(module):
        a, b = pairs[0]
        delta = effective_weight(_OPS, weight, Factors(a, b), float(module.scale), module.m) - weight
    else:
        products = [float(module.scale) * (b @ a) for a, b in pairs]
        delta = products[0] if weight.ndim == 2 else mx.stack(products)
        delta = delta.T if isinstance(base, EMBEDDINGS) else delta
    is_quantised = "scales" in base
    dtype: mx.Dtype = base.scales.dtype if is_quantised else base.weight.dtype
    if not mx.issubdtype(dtype, mx.floating):
        dtype = compute if dequantize else weight.dtype
    layer = _float_layer((weight + delta).astype(dtype), base)
    if "bias" in base:
        layer.bias = base.bias
    if is_quantised and not dequantize:
        layer = _quantised(layer, base)
    mx.eval(layer.parameters())
    size, error = (float(np.array(mx.linalg.norm(x))) for x in (delta, float_weight(layer) - weight - delta))
    return Merged(layer, error / size if size else 0.0)


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """Return the dtype of most of the model's float parameters without LoRA's own: what it computes in."""
    dtypes = Counter(
        array.dtype
        for name, array in flat(model.parameters()).items()
        if mx.issubdtype(array.dtype, mx.floating) and not name.endswith((".lora_a", ".lora_b", ".m"))
    )
    return dtypes.most_common(1)[0][0] if dtypes else mx.float32


def float_weight(layer: Any) -> mx.array:
    """Return the weight of a linear layer, float or quantised, in float32 or wider."""
    if "scales" not in layer:
        return _OPS.at_least_float32(layer.weight)
    wide = mx.float64 if layer.scales.dtype == mx.float64 else mx.float32
    scales, biases, expert_scales = layer.scales, layer.get("biases"), _expert_scales(layer)
    if biases is not None:  # otherwise MLX would round the products to their dtype, which its own kernels do not do
        scales, biases = scales.astype(wide), biases.astype(wide)
    quantisation = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode, "dtype": wide}
    if expert_scales is None:
        return mx.dequantize(layer.weight, scales, biases, **quantisation)
    experts = zip(layer.weight, scales, expert_scales, strict=True)
    return mx.stack([mx.dequantize(w, s, global_scale=scale, **quantisation) for w, s, scale in experts])


def _float_layer(weight: mx.array, like: Any) -> Any:
    rows, columns = weight.shape[-2:]
    if isinstance(like, EMBEDDINGS):
        table: Any = nn.Embedding(rows, columns)
        table.weight = weight
        return table
    layer: Any = nn.Linear(columns, rows, bias=False)
    if weight.ndim == 3:
        layer = SwitchLinear(columns, rows, weight.shape[0], bias=False)
    layer.weight = weight
    return layer


def _quantised(layer: Any, like: Any) -> Any:
    options = {} if _expert_scales(like) is None else {"global_scale": True}
    return layer.to_quantized(group_size=like.group_size, bits=like.bits, mode=like.mode, **options)


def _expert_scales(layer: Any) -> mx.array | None:
    """Return the scales that nvfp4 gives each expert, (experts,), if there are any."""
    return getattr(layer, "global_scale", None)
