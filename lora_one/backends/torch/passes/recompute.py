"""Activations that the backward pass computes again, where keeping them would take too much memory."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]  # accelerate depends on it
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_one.errors import ModelError

CACHES = ("cache", "past_key_values", "layer_past")  # arguments of transformers' blocks
SHARE_OF_FREE = 0.5  # that a forward pass may keep; the loss, the gradients and their SVDs need the rest


class Recompute:
    """Let transformers' blocks keep their activations while these fit in memory. Later blocks keep only their inputs.

    Used as a context manager. A block is assumed to keep as much as the block before it did.

    Attributes:
        active: whether some block of this batch is recomputed.
    """

    def __init__(self, model: nn.Module, recompute: Literal["auto"] | bool, device: torch.device):
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if recompute is True and not blocks:
            raise ModelError("recompute=True needs blocks that transformers can checkpoint, and the model has none")
        checkpointed = [block for block in blocks if block.gradient_checkpointing and block.training]
        self._blocks = [] if recompute is False else [block for block in blocks if block not in checkpointed]
        free = _free_memory(device) if recompute == "auto" else 0
        self._budget = float("inf") if free is None else SHARE_OF_FREE * free
        self._kept = self._last = 0  # bytes that this batch's blocks have kept so far, and that the last one kept
        self.active = False
        self._forwards_before: list[Callable[..., Any] | None] = []

    def __enter__(self) -> "Recompute":
        self._forwards_before = [vars(block).get("forward") for block in self._blocks]
        for block in self._blocks:
            block.forward = partial(self._forward, block, block.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for block, forward in zip(self._blocks, self._forwards_before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward

    def next_batch(self) -> None:
        """Begin a batch: what the one before kept is free."""
        self._kept, self.active = 0, False

    def _forward(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Recomputing would write a cache a second time.
        if not torch.is_grad_enabled() or any(kwargs.get(name) is not None for name in CACHES):
            return forward(*args, **kwargs)
        if self._budget == 0.0 or self._kept + self._last > self._budget:
            self.active = True
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        saved = _Saved(block)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
            y = forward(*args, **kwargs)
        self._last = saved.bytes
        self._kept += self._last
        return y


class _Saved:
    """Counts the bytes that autograd saves: each storage once, and a block's own parameters not at all."""

    def __init__(self, block: nn.Module):
        self.bytes = 0
        self._seen = {pointer for parameter in block.parameters() for pointer, _ in _memory(parameter)}

    def pack(self, x: Tensor) -> Tensor:
        for pointer, size in _memory(x):
            if pointer not in self._seen:
                self._seen.add(pointer)
                self.bytes += size
        return x.detach()  # if x is an output, keeping x itself would be a reference cycle


def _memory(x: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the address and size of a tensor's memory, or of each tensor that it wraps, as a quantised one does."""
    if is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            if isinstance(inner := getattr(x, name), Tensor):
                yield from _memory(inner)
        return
    try:
        storage = x.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # a subclass whose memory cannot be found
        yield id(x), x.nbytes


def _free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device; None if that is unknown."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return None
