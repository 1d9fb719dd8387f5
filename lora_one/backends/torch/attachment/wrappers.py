"""What others put around a model or around its parts: torch.compile, DataParallel, and what cannot be looked into."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_one.errors import ModelError

# By name: their packages are not imported, or are not installed.
_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel, in whatever order they are around it.

    Raises:
        ModelError: a wrapper that shards the weights over processes.
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
    return model


@contextmanager
def plain_names(model: nn.Module) -> Iterator[None]:
    """For a while without the wrappers around a model's parts, which would be in every name below them.

    They come back around the same modules, with the LoRA that has come into these. Where LoRA has taken the very place
    of a wrapped layer, the layer loses its wrapper.

    Raises:
        ModelError: a part in DistributedDataParallel, which knows no parameters that came later.
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
    # torch.compile's OptimizedModule, without an import of the compiler
    if (original := module._modules.get("_orig_mod")) is not None:
        return original
    return module.module if isinstance(module, (nn.DataParallel, DistributedDataParallel)) else None
