"""Adapter folders and MLX's arrays: what is on disk is NumPy's until here."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from lora_one.checkpoint.adapter import Adapter, LoraLayer
from lora_one.checkpoint.mlx_lm import Shapes, is_mlx_lm, read_mlx_lm
from lora_one.checkpoint.peft import check_folder, read_folder
from lora_one.checkpoint.peft import read_adapter as read_peft
from lora_one.checkpoint.plain_lora import setting_problems
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError

_STORED = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.float64: "F64"}  # safetensors' names


def to_layer(pairs: list[Factors], scale: float, is_switch: bool) -> LoraLayer:
    """A LoRA layer's pairs as NumPy arrays."""
    dtype = pairs[0].lora_A.dtype
    wide = mx.float64 if dtype == mx.float64 else mx.float32  # NumPy has no bfloat16
    arrays = [Factors(*(np.array(factor.astype(wide)) for factor in pair)) for pair in pairs]
    return LoraLayer(arrays, scale, _STORED[dtype], is_switch)


def to_mlx(layer: LoraLayer) -> list[Factors]:
    """The inverse of `to_layer`, in the width that they are held in."""
    return [Factors(*(mx.array(np.ascontiguousarray(factor)) for factor in pair)) for pair in layer.pairs]


def stored_dtype(layer: LoraLayer) -> mx.Dtype:
    """The dtype that a layer's factors have on disk."""
    return next(dtype for dtype, name in _STORED.items() if name == layer.dtype)


def read_adapter(path: Path, model: Shapes) -> Adapter:
    """Read a folder that lora-one, mlx-lm or PEFT wrote.

    Args:
        model: the linear layers that the adapter may be for.

    Raises:
        CheckpointError: all that is wrong with files, names, ranks and shapes, at once.
    """
    if is_mlx_lm(path):
        return read_mlx_lm(path, model)
    folder = read_folder(path)
    dense = {name: (shape[0], shape[1]) for name, shape in model.items() if len(shape) == 2}
    problems = check_folder(folder, dense) + setting_problems(folder.config)
    if problems:
        raise CheckpointError(f"the adapter in {path} does not fit the model", problems)
    return read_peft(folder)
