"""Wrappers around a model or its parts: torch.compile and DataParallel, and those that shard the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_one.backends.torch.processes import is_parallel
from lora_one.errors import ModelError

from .sharding import check_sharding, reshard

# By name, because their packages may not be installed.
_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel and DistributedDataParallel, in whatever order.

    If FSDP2 shards its weights, they are in shards afterwards, also where a forward pass has left them whole.

    Raises:
        ModelError: the weights are spread over processes in another way.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    for path, module in model.named_modules():
        sharded = {cls.__name__ for cls in type(module).__mro__}.intersection(_SHARDED)
        if sharded:
            raise ModelError(
                f"{path or 'the model'} is a {min(sharded)}, which shards the weights over processes; whole ones are "
                "expected: attach and start LoRA before sharding, and save or merge the model that it was made from, "
                "with the weights gathered"
            )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelError(
            "the weights are partitioned over processes by DeepSpeed ZeRO-3; whole ones are expected: init, load, save "
            "and merge before, or with the weights gathered"
        )
    reshard(model)
    check_sharding(model)
    return model


def check_open_to_lora(model: nn.Module) -> None:
    """Check that LoRA may be attached to a model in its wrappers: that whoever averages gradients will know of it.

    Raises:
        ModelError: it may not.
    """
    while (inner := _inside(model)) is not None:
        if isinstance(model, DistributedDataParallel) and is_parallel():
            raise ModelError(
                "the model is in DistributedDataParallel without LoRA, whose gradients it would not average: hand in "
                "the model inside of it, and wrap what is returned"
            )
        model = inner


def check_open_to_writing(model: nn.Module) -> None:
    """Check that what is written into the factors stays there.

    Raises:
        ModelError: DeepSpeed has copies of them, which its next step would write over them.
    """
    if any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters()):
        raise ModelError(
            "deepspeed.initialize has copied the trainable weights, and its next step would write its copies over "
            "others: call lora_one.init, load and optimizer before deepspeed.initialize"
        )


@contextmanager
def plain_names(model: nn.Module) -> Iterator[None]:
    """Temporarily remove the wrappers around a model's parts, which would be in the name of every layer inside.

    Afterwards they are around the same modules again, with the LoRA that these contain. A wrapped layer that LoRA has
    replaced loses its wrapper.

    Raises:
        ModelError: a part is in DistributedDataParallel, which does not know parameters that come later.
    """
    wrapped = []
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            if isinstance(child, DistributedDataParallel):
                raise ModelError(
                    f"{'.'.join(filter(None, (path, name)))} is in DistributedDataParallel, which would not average "
                    "the gradients of LoRA that comes later: wrap it after init or load"
                )
            if child is not None and _inside(child) is not None:
                wrapped.append((parent, name, child))
    for parent, name, child in wrapped:
        parent._modules[name] = unwrapped(child)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            if parent._modules.get(name) is unwrapped(child):
                parent._modules[name] = child


def _inside(module: nn.Module) -> nn.Module | None:
    # torch.compile's OptimizedModule, recognised without importing the compiler
    if (original := module._modules.get("_orig_mod")) is not None:
        return original
    return module.module if isinstance(module, (nn.DataParallel, DistributedDataParallel)) else None
