"""The layout of LoRA factors in mlx-lm, and ours. No other file knows that theirs are transposed, or stacked."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRAEmbedding, LoRASwitchLinear

from lora_one.core.factors import Factors

# LoRALinear:        lora_a (in, r), lora_b (r, out)
# LoRASwitchLinear:  lora_a (experts, r, in), lora_b (experts, out, r)
# LoRAEmbedding:     lora_a (tokens, r), lora_b (r, dim): of W, (dim, tokens), the table transposed
LoraModule = Any  # one of the three: mlx types no attribute of a module
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def base_of(module: LoraModule) -> Any:
    """Return the layer without LoRA."""
    return module.embedding if isinstance(module, LoRAEmbedding) else module.linear


def is_switch(module: nn.Module) -> bool:
    """Return whether the module has one factor pair per expert."""
    return isinstance(module, LoRASwitchLinear)


def dropout_of(module: LoraModule) -> float:
    """Return the dropout rate of a LoRA layer. nn.Dropout keeps only 1 - rate, in a private attribute."""
    return float(1.0 - module.dropout._p_1)


def set_dropout(module: LoraModule, rate: float) -> None:
    module.dropout._p_1 = 1.0 - rate


def read_factor(module: nn.Module, array: mx.array) -> list[mx.array]:
    """Return `lora_a`, or its gradient, as lora_A's (r, in), or `lora_b` as lora_B's (out, r): one entry per pair."""
    if is_switch(module):
        return [array[index] for index in range(array.shape[0])]
    return [array.T]


def write_factor(module: nn.Module, factors: Sequence[mx.array]) -> mx.array:
    """Return the inverse of `read_factor`: `lora_a` from one lora_A per pair, or `lora_b` from lora_B's."""
    if is_switch(module):
        return mx.stack(list(factors))
    return factors[0].T


def as_factors(a: mx.array, b: mx.array) -> Factors:
    """Return `lora_a` and `lora_b`, or their gradients, as one `Factors`, with a leading axis if they are experts'."""
    return Factors(a, b) if a.ndim == 3 else Factors(a.T, b.T)


def as_arrays(pair: Factors) -> tuple[mx.array, mx.array]:
    """Return the inverse of `as_factors`, as copies, for the reason given in `write_pairs`."""
    a, b = pair if pair.lora_A.ndim == 3 else (pair.lora_A.T, pair.lora_B.T)
    return mx.contiguous(a), mx.contiguous(b)


def read_pairs(module: LoraModule) -> list[Factors]:
    """Return the module's pairs: one, or one per expert."""
    a, b = (read_factor(module, module[name]) for name in ("lora_a", "lora_b"))
    return [Factors(*pair) for pair in zip(a, b, strict=True)]


def write_pairs(module: LoraModule, pairs: Sequence[Factors], stored: mx.Dtype | None = None) -> None:
    """Set the module's pairs, in the dtype of its factors, or a wider one that can hold the dtype `stored` too."""
    for name, factors in zip(("lora_a", "lora_b"), zip(*pairs, strict=True), strict=True):
        dtype = module[name].dtype
        array = write_factor(module, factors).astype(dtype if stored is None else mx.result_type(dtype, stored))
        # A view would keep its whole source in memory, and a saver may write the source's order: copy it.
        module[name] = mx.contiguous(array)
