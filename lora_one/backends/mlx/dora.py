"""The magnitudes of mlx-lm's DoRA layers, which their start has to set."""

from typing import Any

import mlx.core as mx
from mlx_lm.tuner.dora import DoRALinear

from lora_one.core.dora import magnitudes
from lora_one.core.factors import Factors

from .layout import LoraModule, read_pairs
from .ops import MlxOps

_OPS = MlxOps()


def is_dora(module: LoraModule) -> bool:
    """Return whether a LoRA layer has magnitudes, m (out,)."""
    return isinstance(module, DoRALinear)


def lora_names(module: LoraModule) -> tuple[str, ...]:
    """Return the names of a LoRA layer's own parameters."""
    return ("lora_a", "lora_b", "m") if is_dora(module) else ("lora_a", "lora_b")


def magnitude_of(module: LoraModule, pair: Factors) -> mx.array:
    """Return the magnitudes, (out,), with which a DoRA layer computes (W + s B A) x."""
    weight: Any = module._dequantized_weight()  # as the layer itself reads it, so that its quotients are 1
    m: mx.array = magnitudes(_OPS, weight, pair, module.scale)
    return m


def renew_magnitude(module: LoraModule) -> None:
    """Let a layer with DoRA compute (W + s B A) x; others do."""
    if is_dora(module):
        module.m = magnitude_of(module, read_pairs(module)[0])
