"""Weights that are spread over processes: by FSDP2, `fully_shard`, or by DeepSpeed, see `zero`.

FSDP2's are DTensors, of which each process has some rows. Their modules gather them for a forward and a backward pass,
and may leave them whole after it. What is written into whole ones is lost, so they are put back into shards before
anything reads or writes them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lora_one.errors import ModelError

from . import zero


def is_sharded(model: nn.Module) -> bool:
    """Return whether processes have parts of a model's weights."""
    return any(is_dtensor(p) or zero.is_partitioned(p) for p in model.parameters())


def units(model: nn.Module) -> list[Any]:
    """Return the modules whose weights FSDP2 gathers."""
    return [x for x in model.modules() if is_unit(x)]


def is_unit(module: nn.Module) -> bool:
    """Return whether FSDP2 gathers weights of a module at its calls."""
    # By name: builds of PyTorch without processes do not have the class.
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def reshard(model: nn.Module) -> None:
    """Put the weights that are whole after a forward pass back into shards."""
    for module in units(model):
        module.reshard()


def note_trainable(model: nn.Module) -> None:
    """Let FSDP2 see which weights are trainable: in its first forward pass, while all were frozen, it saw none.

    It would fail in the first backward pass of a training in mixed precision.
    """
    for module in units(model):
        module.unshard()  # looks again, and gathers
        module.reshard()


def write(parameter: Tensor, values: Tensor) -> None:
    """Copy values into a parameter, of which this process may have a shard.

    They are the same in every process, or what `own_part` has returned.
    """
    with torch.no_grad():
        if zero.is_partitioned(parameter) or zero.has_master(parameter):
            zero.write(parameter, values)
            return
        if not is_dtensor(parameter):
            parameter.copy_(values)
            return
        from torch.distributed.tensor import distribute_tensor

        own: Any = values
        if not is_dtensor(values):
            mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            own = distribute_tensor(values.to(parameter.dtype).contiguous(), mesh, placements, src_data_rank=None)
        parameter.to_local().copy_(own.to_local())  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor whole. Every process must call it, in the same order."""
    if zero.is_partitioned(tensor):
        return zero.gathered(tensor)
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Any) -> Tensor:
    """Return a copy of what this process has of a tensor, for `write`."""
    part: Tensor = tensor.ds_tensor if zero.is_partitioned(tensor) else tensor
    return part.detach().clone()


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor when it is whole."""
    return tuple(tensor.ds_shape if zero.is_partitioned(tensor) else tensor.shape)


def is_spread(tensor: Tensor) -> bool:
    """Return whether only `write` can change a tensor."""
    return is_dtensor(tensor) or zero.is_partitioned(tensor) or zero.has_master(tensor)


def is_dtensor(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, without importing what some builds of PyTorch do not have."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def from_part(part: Tensor, like: Any, placements: Sequence[Any], shape: Sequence[int]) -> Any:
    """Return the DTensor of this shape, on the mesh of another one, of which this process has a part."""
    from torch.distributed.tensor import DTensor

    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        part, like.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def check_sharding(model: nn.Module) -> None:
    """Check that weights are spread over processes by FSDP2 or by tensor parallelism, if at all.

    Raises:
        ModelError: they are not, with the remedy.
    """
    of_fsdp = {id(p) for module in units(model) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter) and (reason := _unsuitable(parameter, id(parameter) in of_fsdp)):
            raise ModelError(f"{name}: its weights are {reason}")


def check_separable(model: nn.Module, base: nn.Module) -> None:
    """Check that a base model can be called without the model around it.

    Raises:
        ModelError: `fully_shard` was called on the outer one, which gathers weights of the base; or DeepSpeed keeps
            them in parts.
    """
    if any(map(zero.is_partitioned, model.parameters())):
        raise ModelError(
            "DeepSpeed ZeRO-3 keeps the weights in parts, and its engine would not know the model without LoRA: save "
            "the adapter, then load it on the whole base model, and merge there"
        )
    own = {id(p) for p in base.parameters() if is_dtensor(p)}
    of_base = {id(p) for module in units(base) for p in module.parameters()}
    if not own <= of_base:
        raise ModelError(
            "fully_shard was called on the PeftModel, and without that nothing would gather the weights of the base "
            "model: save the adapter, then load it on the whole base model and merge there; or call fully_shard on "
            "model.get_base_model() instead"
        )


def _unsuitable(parameter: Any, is_of_fsdp: bool) -> str | None:
    mesh, kind = parameter.device_mesh, "fully_shard" if is_of_fsdp else "tensor parallelism"
    if sum(not placement.is_replicate() for placement in parameter.placements) > 1:
        return (
            "split over processes by fully_shard and tensor parallelism at once; one of them is expected: init, save, "
            "load and merge with whole weights"
        )
    if mesh.size() != dist.get_world_size():
        return (
            f"spread by {kind} over {mesh.size()} of {dist.get_world_size()} processes; a mesh of all of them is "
            "expected: attach and start LoRA before that"
        )
    if parameter.device.type != mesh.device_type:
        return (
            f"offloaded to {parameter.device.type} by FSDP2, which computes on {mesh.device_type}: attach and start "
            "LoRA before sharding, or shard without an offload policy"
        )
    return None
