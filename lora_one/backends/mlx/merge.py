"""W + s B A of one LoRA layer, in at least float32, as a linear layer of mlx or mlx-lm; and what its dtype loses of it.

mlx-lm's own `fuse` adds in the weight's dtype, which for mxfp4, nvfp4 and mxfp8 is bfloat16 in any model, and knows
nothing of the scales that nvfp4 gives each expert.
"""

from collections import Counter
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from .layout import LoraModule, read_pairs
from .ops import MlxOps
from .tree import flat

_OPS = MlxOps()


class Merged(NamedTuple):
    """A linear layer that holds the adapter."""

    layer: nn.Module
    rounding: float  # its size over that of s B A, in the Frobenius norm


def merged_layer(module: LoraModule, dequantize: bool, compute: mx.Dtype) -> Merged:
    """What is to take a LoRA layer's place.

    Args:
        dequantize: whether a quantised layer becomes a float one.
        compute: the dtype of a float layer whose quantised weight does not say it.
    """
    base: Any = module.linear
    weight = float_weight(base)  # (out, in) or (experts, out, in)
    pairs = [[_OPS.at_least_float32(factor) for factor in pair] for pair in read_pairs(module)]
    products = [float(module.scale) * (b @ a) for a, b in pairs]
    delta = products[0] if weight.ndim == 2 else mx.stack(products)
    quantised = "scales" in base
    kept: mx.Dtype = base.scales.dtype if quantised else base.weight.dtype
    if not mx.issubdtype(kept, mx.floating):
        kept = compute if dequantize else weight.dtype
    layer = _plain((weight + delta).astype(kept))
    if "bias" in base:
        layer.bias = base.bias
    if quantised and not dequantize:
        layer = _quantised(layer, base)
    mx.eval(layer.parameters())
    size, error = (float(np.array(mx.linalg.norm(x))) for x in (delta, float_weight(layer) - weight - delta))
    return Merged(layer, error / size if size else 0.0)


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype of most of the model's float parameters, LoRA's own apart: what it computes in."""
    dtypes = Counter(
        array.dtype
        for name, array in flat(model.parameters()).items()
        if mx.issubdtype(array.dtype, mx.floating) and not name.endswith((".lora_a", ".lora_b"))
    )
    return dtypes.most_common(1)[0][0] if dtypes else mx.float32


def float_weight(layer: Any) -> mx.array:
    """The weight of a linear layer, float or quantised, in float32 or wider."""
    if "scales" not in layer:
        return _OPS.at_least_float32(layer.weight)
    wide = mx.float64 if layer.scales.dtype == mx.float64 else mx.float32
    scales, biases, each = layer.scales, layer.get("biases"), _global_scale(layer)
    if biases is not None:  # or the products would be rounded to their dtype, as no kernel of MLX's does
        scales, biases = scales.astype(wide), biases.astype(wide)
    quantisation = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode, "dtype": wide}
    if each is None:
        return mx.dequantize(layer.weight, scales, biases, **quantisation)
    experts = zip(layer.weight, scales, each, strict=True)
    return mx.stack([mx.dequantize(w, s, global_scale=one, **quantisation) for w, s, one in experts])


def _plain(weight: mx.array) -> Any:
    rows, columns = weight.shape[-2:]
    layer: Any = nn.Linear(columns, rows, bias=False)
    if weight.ndim == 3:
        layer = SwitchLinear(columns, rows, weight.shape[0], bias=False)
    layer.weight = weight
    return layer


def _quantised(layer: Any, like: Any) -> Any:
    options = {} if _global_scale(like) is None else {"global_scale": True}
    return layer.to_quantized(group_size=like.group_size, bits=like.bits, mode=like.mode, **options)


def _global_scale(layer: Any) -> mx.array | None:
    """nvfp4's scale of each expert, (experts,), where there is one."""
    return getattr(layer, "global_scale", None)
