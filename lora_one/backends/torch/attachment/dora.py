"""DoRA's magnitudes in PEFT's linear layers, which their start has to set."""

from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import nn

from lora_one.backends.torch.ops import TorchOps
from lora_one.core.dora import magnitudes
from lora_one.core.factors import Factors

from .sharding import is_spread, write


def magnitude_of(layer: LoraLayer, adapter: str) -> nn.Parameter | None:
    """Return the magnitudes of a layer, (out,); None without DoRA."""
    vectors = layer.lora_magnitude_vector
    magnitude: nn.Parameter | None = vectors[adapter].weight if adapter in vectors else None
    return magnitude


def renew_magnitude(layer: LoraLayer, adapter: str) -> None:
    """Let a layer with DoRA compute (W + s B A) x: set its magnitudes to the norms of W + s B A."""
    magnitude = magnitude_of(layer, adapter)
    if magnitude is None:
        return
    pair = Factors(layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach())
    weight = transpose(dequantize_module_weight(layer.get_base_layer()).detach(), getattr(layer, "fan_in_fan_out", 0))
    write(magnitude, magnitudes(TorchOps(), weight.to(pair.lora_A.device), pair, layer.scaling[adapter]))


def has_magnitudes(model: nn.Module) -> bool:
    """Return whether a layer of a model has DoRA, of any adapter."""
    return any(isinstance(layer, LoraLayer) and bool(layer.lora_magnitude_vector) for layer in model.modules())


def is_whole(layer: LoraLayer) -> bool:
    """Return whether no part of a layer's weight is in another process."""
    return not any(is_spread(parameter) for parameter in layer.get_base_layer().parameters(recurse=False))
