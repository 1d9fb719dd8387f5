"""Wrappers around a model or its parts: torch.compile, DataParallel, DeepSpeed, and those that are not understood."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_one.backends.torch.processes import is_parallel
from lora_one.errors import ModelError

from .sharding import check_sharding, reshard
from .tensor_parallel import check_visible
from .zero import has_engine

# By name, because their packages may not be installed.
_ENGINE, _PIPELINE = "DeepSpeedEngine", "PipelineEngine"
_NOT_UNDERSTOOD = ("FullyShardedDataParallel", _PIPELINE)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel, DistributedDataParallel and DeepSpeed's engine.

    If FSDP2 shards its weights, they are in shards afterwards, also where a forward pass has left them whole.

    Raises:
        ModelError: the weights are spread over processes in another way.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    for path, module in model.named_modules():
        sharded = _classes(module).intersection(_NOT_UNDERSTOOD)
        if sharded:
            raise ModelError(
                f"{path or 'the model'} is a {min(sharded)}, which shards the weights over processes; whole ones are "
                "expected: attach and start LoRA before sharding, and save or merge the model that it was made from, "
                "with the weights gathered"
            )
    reshard(model)
    check_sharding(model)
    check_visible(model)
    return model


def check_open_to_lora(model: nn.Module) -> None:
    """Check that LoRA may be attached to a model in its wrappers: that whoever averages gradients will know of it.

    Raises:
        ModelError: it may not.
    """
    if has_engine(model) or any(map(is_engine, model.modules())):
        raise ModelError(
            "deepspeed.initialize was called before the model had LoRA, so that the engine would not train LoRA that "
            "comes later: attach LoRA first, by lora_one.init or peft.get_peft_model, and call deepspeed.initialize "
            "then; init also starts a model that has its LoRA and an engine"
        )
    while (inner := _inside(model)) is not None:
        if isinstance(model, DistributedDataParallel) and is_parallel():
            raise ModelError(
                "the model is in DistributedDataParallel without LoRA, whose gradients it would not average: hand in "
                "the model inside of it, and wrap what is returned"
            )
        model = inner


def is_engine(model: nn.Module) -> bool:
    """Return whether a model is in DeepSpeed's engine."""
    classes = _classes(model)
    return _ENGINE in classes and _PIPELINE not in classes


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
    is_wrapper = isinstance(module, (nn.DataParallel, DistributedDataParallel)) or is_engine(module)
    return module._modules["module"] if is_wrapper else None


def _classes(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}
