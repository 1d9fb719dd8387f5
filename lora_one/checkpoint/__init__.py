"""Adapters on disk, without a framework: PEFT's layout, mlx-lm's layout, and lora-one's own `lora_one.json`.

adapter_config.json       one file for both layouts: PEFT ignores mlx-lm's keys, and mlx-lm ignores PEFT's
adapter_model.safetensors PEFT: lora_A (r, in), lora_B (out, r); each layer has its own rank and scale
adapters.safetensors      mlx-lm: lora_a (in, r), lora_b (r, out), or (experts, r, in), (experts, out, r) for a stack of
                          experts; all layers share one rank and one scale, so smaller ranks are padded with zeros, and
                          another scale becomes a factor in lora_b
lora_one.json             what made the adapter, and the report of its start
"""

from .metadata import read_report
from .peft import check_folder, read_adapter, read_folder

__all__ = ["check_folder", "read_adapter", "read_folder", "read_report"]
