"""mlx-lm's layout of LoRA factors and ours. The only file that knows that mlx-lm's are transposed, or stacked."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRASwitchLinear

from lora_one.core.factors import Factors

# LoRALinear:        lora_a (in, r), lora_b (r, out)
# LoRASwitchLinear:  lora_a (experts, r, in), lora_b (experts, out, r)
LoraModule = Any  # one of the two: mlx types no attribute of a module


def is_switch(module: nn.Module) -> bool:
    """Whether the module has a factor pair per expert."""
    return isinstance(module, LoRASwitchLinear)


def read_factor(module: nn.Module, array: mx.array) -> list[mx.array]:
    """`lora_a`, or its gradient, as lora_A's (r, in); `lora_b` as lora_B's (out, r): one, or one an expert."""
    if is_switch(module):
        return [array[index] for index in range(array.shape[0])]
    return [array.T]


def write_factor(module: nn.Module, factors: Sequence[mx.array]) -> mx.array:
    """The inverse of `read_factor`: lora_A's as `lora_a`, or lora_B's as `lora_b`."""
    if is_switch(module):
        return mx.stack(list(factors))
    return factors[0].T


def read_pairs(module: LoraModule) -> list[Factors]:
    """The module's pairs: one, or one an expert."""
    a, b = (read_factor(module, module[name]) for name in ("lora_a", "lora_b"))
    return [Factors(*pair) for pair in zip(a, b, strict=True)]


def write_pairs(module: LoraModule, pairs: Sequence[Factors], stored: mx.Dtype | None = None) -> None:
    """Set the module's pairs, in the dtype that they have in the module, or a wider one that holds `stored` as well."""
    for name, factors in zip(("lora_a", "lora_b"), zip(*pairs, strict=True), strict=True):
        dtype = module[name].dtype
        array = write_factor(module, factors).astype(dtype if stored is None else mx.result_type(dtype, stored))
        # A contiguous copy: a view would keep the array it came from in memory, and savers may write it as it lies.
        module[name] = mx.contiguous(array)
