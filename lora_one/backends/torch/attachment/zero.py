"""Weights that DeepSpeed's ZeRO keeps: in parts over processes, its stage 3, and once more in float32, every stage.

A weight in parts has a `ds_id`. It is empty outside of its module's forward and backward pass, and `ds_tensor` is the
part of this process. What the engine trains is a copy, the master, and each step writes it over the weight: whatever is
written into a weight is written into its master too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether each process has a part of a tensor."""
    return hasattr(tensor, "ds_id")


def has_master(tensor: Tensor) -> bool:
    """Return whether an engine trains a copy of a tensor."""
    if (optimizer := getattr(tensor, "_z3_optimizer", None)) is not None:
        return any(tensor is trained for group in optimizer.fp16_groups for trained in group)
    return hasattr(tensor, "_hp_mapping")


def has_engine(model: nn.Module) -> bool:
    """Return whether `deepspeed.initialize` has been called for a model, or a part of it."""
    return any(has_master(parameter) for parameter in model.parameters())


def gathered(tensor: Any) -> Tensor:
    """Return a copy of a tensor in parts, whole. Every process must call it, in the same order."""
    if tensor.ds_status.name == "AVAILABLE":  # whole in all processes: small, or gathered by the caller
        return tensor.detach().clone()
    from deepspeed import zero

    with zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def write(parameter: Any, values: Tensor) -> None:
    """Write values into a parameter and its master: whole ones, the same in every process, or its part, (n,).

    It takes no word with other processes, so that one alone can put back what it had.
    """
    if is_partitioned(parameter):
        parameter.partition()  # what is whole now would be read on
        parameter.ds_tensor.data.copy_(values if values.ndim == 1 else _part_of(parameter, values))
        parameter.ds_secondary_tensor = None  # a copy in each node, which is made again
    else:
        parameter.copy_(values)
    if has_master(parameter):
        _write_master(parameter)


def _part_of(parameter: Any, values: Tensor) -> Tensor:
    """Return the part of whole values that this process keeps, filled up by zeros in the last one."""
    group, count = parameter.ds_process_group, parameter.partition_numel()
    padding = count * dist.get_world_size(group) - values.numel()
    return nn.functional.pad(values.flatten(), (0, padding)).narrow(0, count * dist.get_rank(group), count)


def _write_master(parameter: Any) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    requires_grad = parameter.requires_grad
    parameter.requires_grad_(True)  # masters of others cannot be written, and nothing says so
    try:
        if is_partitioned(parameter):
            safe_set_local_fp32_param(parameter, parameter.ds_tensor)
        else:
            safe_set_full_fp32_param(parameter, parameter)
    finally:
        parameter.requires_grad_(requires_grad)


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Let the modules of a model gather their weights for a pass, as those of an engine do by themselves.

    `deepspeed.zero.Init` leaves a model without an engine: its weights are in parts already.
    """
    with ExitStack() as stack:
        if not any(hasattr(module, "ds_id") for module in model.modules()):  # an engine's modules have one
            for module in model.modules():
                if weights := [p for p in module.parameters(recurse=False) if is_partitioned(p)]:
                    _gather_for(module, weights, stack)
        yield


def _gather_for(module: nn.Module, weights: list[Any], stack: ExitStack) -> None:
    def gather(*_: Any) -> None:
        weights[0].all_gather(param_list=weights)

    def release(*_: Any) -> None:
        weights[0].partition(param_list=weights)

    for handle in (
        module.register_forward_pre_hook(gather),
        module.register_forward_hook(release, always_call=True),
        module.register_full_backward_pre_hook(gather),
        module.register_full_backward_hook(release),
    ):
        stack.callback(handle.remove)
    stack.callback(release)
