"""An adapter in memory, in no framework's arrays: what the layouts on disk are read into and written from."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from lora_one.core.factors import Factors


class LoraLayer(NamedTuple):
    """What an adapter holds for one layer: it adds scaling * B A to the weight."""

    pairs: list[Factors]  # NumPy, float32 or wider: lora_A (r, in), lora_B (out, r); one, or one an expert
    scaling: float
    dtype: str = "F32"  # that the factors are stored in, by safetensors' name
    is_switch: bool = False  # a stack of experts, mlx-lm's SwitchLinear

    @property
    def rank(self) -> int:
        return int(self.pairs[0].lora_A.shape[0])


class Adapter(NamedTuple):
    """An adapter."""

    layers: dict[str, LoraLayer]  # by path in the base model
    dropout: float = 0.0
    task: str | None = None  # PEFT's task_type
    notes: Mapping[str, str] = MappingProxyType({})  # of a backend to itself, in the header of PEFT's file
