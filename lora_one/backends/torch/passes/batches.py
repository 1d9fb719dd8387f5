"""The loss of each batch, and everything that can be wrong with batches and losses."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from lora_one.backends.checks import check_finite_loss, with_last
from lora_one.errors import BatchError

from .token_loss import loss_by_rows

LossFn = Callable[[nn.Module, Any], Tensor]
Evaluate = Callable[[], tuple[Tensor, float]]  # runs a forward pass; returns the loss and its value


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a transformers model computes itself.

    Raises:
        BatchError: the batch is not a mapping, or the model returned no loss.
    """
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"without loss_fn a batch must be a mapping of the model's arguments, got {type(batch).__name__}: "
            "pass loss_fn=(model, batch) -> mean loss"
        )
    with loss_by_rows(model):
        output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise BatchError(
            f"without loss_fn the model must return a loss, got none for a batch of {sorted(batch)}: add labels to the "
            "batch, or pass loss_fn=(model, batch) -> mean loss"
        )
    return loss


def losses(model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> Iterator[tuple[Evaluate, bool]]:
    """Yield for each batch a function that computes its loss and checks it, and whether the batch is the last.

    Raises:
        BatchError: there are no batches, or a loss is not a scalar.
        GradientError: a loss is not finite.
    """
    device = device_of(model)
    for index, (batch, last) in enumerate(with_last(batches), start=1):
        yield partial(_loss, model, send_to_device(batch, device), loss_fn, index), last


def _loss(model: nn.Module, batch: Any, loss_fn: LossFn, index: int) -> tuple[Tensor, float]:
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BatchError(f"batch {index}: the loss must be a scalar tensor, got {got}: return the mean over the batch")
    return loss, check_finite_loss(float(loss.detach()), index)


def check_depends(loss: Tensor, index: int, called: bool, layer: str) -> None:
    """Check that a loss depends on the target layers.

    Args:
        called: whether any target layer was called.
        layer: the name of a target layer.

    Raises:
        BatchError: the loss depends on none of them.
    """
    if loss.requires_grad:
        return
    if called:
        raise BatchError(
            f"batch {index}: the loss must depend on the target layers, got one without a gradient: is it detached, "
            "computed under no_grad, or of another model?"
        )
    raise BatchError(
        f"batch {index}: the loss must depend on the target layers, got one without a gradient, and no target layer "
        f"was called, {layer!r} for one: is it the loss of another model, or do fused kernels read weights past the "
        "layers? There LoRA would have no effect: switch them off, or name other targets"
    )


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model's batches go to: that of its first weight that is not offloaded to "meta"."""
    return next(p.device for p in model.parameters() if not p.is_meta)
