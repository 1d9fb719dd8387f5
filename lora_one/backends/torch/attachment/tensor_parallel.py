"""Linear layers that tensor parallelism splits, as transformers does: DTensors that no FSDP2 gathers.

All processes of a layer read the same batches. A column-wise layer gives each of them some columns of y, a row-wise
one gets some columns of x; PEFT splits lora_B or lora_A like the weight.
"""

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_one.errors import ModelError

from .sharding import from_part, is_dtensor, units

_SPLIT = {0: "lora_B", 1: "lora_A"}  # axis of W that is split -> the factor that is split along the same axis


def group_size(model: nn.Module) -> int:
    """Return how many processes read the same batches: 1 without tensor parallelism."""
    meshes = [p.device_mesh for p in model.parameters() if is_dtensor(p)]  # type: ignore[attr-defined]
    return meshes[0].size() if meshes and not units(model) else 1


def check_visible(model: nn.Module) -> None:
    """Check that weights which are split are DTensors.

    Raises:
        ModelError: they are smaller weights, of which nothing tells that they are parts.
    """
    if any(map(is_dtensor, model.parameters())):
        return
    for path, module in model.named_modules():
        if getattr(module, "_hf_tp_plan", None):
            raise ModelError(
                f"{path}: it is split over processes by tensor parallelism, and its weight does not show it: load the "
                "model by transformers 5.17 or newer, or whole"
            )


def whole_columns(x: Tensor, features: int, weight: Any) -> Tensor:
    """Return all columns of a layer's input or output, of which this process may have some.

    Args:
        x: (..., features), or less.
        features: how many columns there are.
        weight: the layer's, which knows the processes.
    """
    if x.shape[-1] == features:
        return x
    from torch.distributed.tensor import Shard

    whole: Tensor = from_part(x.contiguous(), weight, [Shard(x.ndim - 1)], (*x.shape[:-1], features)).full_tensor()
    return whole


def prepare_factors(adapted: nn.Module, adapter: str) -> None:
    """Check that LoRA's factors are split like the weights of their layers, and let them know how wide they are.

    PEFT gives their layers the width of a part, and transformers 5.24 expects that of the whole.

    Raises:
        ModelError: they are not split, so that the layer cannot add what they compute to its own output.
    """
    if group_size(adapted) > 1:
        for path, module in adapted.named_modules():
            if isinstance(module, LoraLayer) and adapter in module.lora_A:
                _prepare(path, module, adapter)


def _prepare(path: str, layer: LoraLayer, adapter: str) -> None:
    weight: Any = getattr(layer.get_base_layer(), "weight", None)
    if not is_dtensor(weight):
        return
    (placement,) = weight.placements
    name = _SPLIT.get(placement.dim) if placement.is_shard() else None
    for side in _SPLIT.values():
        factor = getattr(layer, side)[adapter]
        if is_dtensor(factor.weight):
            factor.out_features, factor.in_features = factor.weight.shape
        elif side == name:
            raise ModelError(
                f"{path}: its weight is split over processes by tensor parallelism, and {name} is not: load the model "
                "by transformers 5.17 or newer, from_pretrained(distributed_config=DistributedConfig(tp_size=...)), "
                "for which PEFT splits LoRA too"
            )
