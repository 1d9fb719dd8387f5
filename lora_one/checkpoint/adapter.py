"""An adapter in memory, in NumPy: what both layouts on disk are read into and written from."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from lora_one.core.factors import Factors

from .tensors import Tensor


class Form(NamedTuple):
    """The kind of layer that factors are for. As matrices they mean the same for all: see the backends' layers.

    PEFT calls an embedding's factors by other names, and keeps a convolution's with the axes of its kernel.
    """

    is_embedding: bool = False  # W, (out, in), is the transposed table: in counts tokens
    kernel: tuple[int, ...] = ()  # sizes of a convolution's kernel; lora_A is (r, channels * sizes)

    @property
    def name(self) -> str:
        if self.is_embedding:
            return "an embedding"
        return f"a convolution of {self.kernel}" if self.kernel else "a linear layer"


LINEAR = Form()


class LoraLayer(NamedTuple):
    """The LoRA factors of one layer: they add scaling * B A to its weight. With a magnitude it is DoRA."""

    pairs: list[Factors]  # NumPy, float32 or wider: lora_A (r, in), lora_B (out, r); one pair, or one per expert
    scaling: float
    dtype: str = "F32"  # the dtype that the factors are stored in, by safetensors' name
    is_switch: bool = False  # a stack of experts, mlx-lm's SwitchLinear
    form: Form = LINEAR
    magnitude: Tensor | None = None  # DoRA's m, (out,): the rows of W + scaling * B A get these lengths

    @property
    def rank(self) -> int:
        return int(self.pairs[0].lora_A.shape[0])

    def with_scale(self, scaling: float, rank: int) -> "LoraLayer":
        """Return a layer that computes the same, with another scale and as many ranks, the new ones zero."""
        missing, ratio = rank - self.rank, self.scaling / scaling
        pairs = [
            Factors(np.pad(a, [(0, missing), (0, 0)]), np.pad((b * ratio).astype(b.dtype), [(0, 0), (0, missing)]))
            for a, b in self.pairs
        ]
        return self._replace(pairs=pairs, scaling=scaling)


class Adapter(NamedTuple):
    """The LoRA layers of a model, and the settings that are stored beside them."""

    layers: dict[str, LoraLayer]  # by path in the base model
    dropout: float = 0.0
    task: str | None = None  # PEFT's task_type
    notes: Mapping[str, str] = MappingProxyType({})  # a backend's own entries in the header of PEFT's file
    modules_to_save: tuple[str, ...] = ()  # paths of the modules that were trained whole
    whole: Mapping[str, Tensor] = MappingProxyType({})  # their parameters, by path: see `whole`

    @property
    def is_dora(self) -> bool:
        """Whether the layers have magnitudes."""
        return any(layer.magnitude is not None for layer in self.layers.values())
