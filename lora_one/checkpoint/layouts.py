"""The two layouts of a LoRA adapter on disk, PEFT's and mlx-lm's: names, axes, scales and configurations.

adapter_config.json       one file for both: PEFT ignores mlx-lm's keys, mlx-lm ignores PEFT's
adapter_model.safetensors PEFT: lora_A (r, in), lora_B (out, r); each layer has its own rank and scale
adapters.safetensors      mlx-lm: lora_a (in, r), lora_b (r, out), or (experts, r, in), (experts, out, r); one rank and
                          one scale for all layers: zeros and a ratio in lora_b make up for it
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .adapter import Adapter, LoraLayer
from .peft import CONFIG, MLX_WEIGHTS, PEFT_KEY, WEIGHTS
from .scales import plain_settings
from .tensors import Tensor, wider, write_tensors


def write_peft(path: Path, adapter: Adapter) -> None:
    """Write, into an empty folder, what PEFT, vLLM and `lora_one.load` open."""
    write_tensors(path / WEIGHTS, _peft_tensors(adapter), "pt", adapter.notes)
    _write_config(path, _peft_config(adapter))


def write_mlx_lm(path: Path, adapter: Adapter, num_layers: int) -> None:
    """Write, into an empty folder, what mlx-lm opens, and PEFT too, but for experts, whose stacks PEFT cannot name.

    Args:
        num_layers: blocks of the model, which mlx-lm's configuration wants to hold.
    """
    rank = max(layer.rank for layer in adapter.layers.values())
    scales = Counter(layer.scaling for layer in adapter.layers.values() if layer.scaling)
    scale = scales.most_common(1)[0][0] if scales else 1.0  # layers of scale 0 get a lora_b of zeros
    parameters = {"rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": list(adapter.layers)}
    config: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors.update(_mlx_lm_tensors(name, layer, rank, scale))
    write_tensors(path / MLX_WEIGHTS, tensors, "mlx")
    if not any(layer.is_switch for layer in adapter.layers.values()):
        config.update(_peft_config(adapter))
        write_tensors(path / WEIGHTS, _peft_tensors(adapter), "pt")
    _write_config(path, config)


def _peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {
        PEFT_KEY.format(path=name, side=side): Tensor(factor, layer.dtype)
        for name, layer in adapter.layers.items()
        for side, factor in zip("AB", layer.pairs[0], strict=True)
    }


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": adapter.task,
        "base_model_name_or_path": None,
        "inference_mode": True,
        **plain_settings({name: (layer.rank, layer.scaling) for name, layer in adapter.layers.items()}),
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": list(adapter.layers),
    }


def _mlx_lm_tensors(name: str, layer: LoraLayer, rank: int, scale: float) -> dict[str, Tensor]:
    """The layer's factors at the rank and the scale that the whole folder has."""
    missing, ratio = rank - layer.rank, layer.scaling / scale
    a = np.stack([np.pad(pair.lora_A, [(0, missing), (0, 0)]) for pair in layer.pairs])  # (experts, r, in)
    b = np.stack([np.pad(pair.lora_B, [(0, 0), (0, missing)]) for pair in layer.pairs])  # (experts, out, r)
    dtype = layer.dtype
    if ratio != 1.0:
        b, dtype = (b * ratio).astype(b.dtype), wider(dtype, "F32")  # in bfloat16 the product would be rounded again
    a, b = (a, b) if layer.is_switch else (a[0].T, b[0].T)
    return {f"{name}.lora_a": Tensor(a, layer.dtype), f"{name}.lora_b": Tensor(b, dtype)}


def _write_config(path: Path, config: dict[str, Any]) -> None:
    (path / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
