"""The loss of a batch, and checks of both."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.tuner.trainer import default_loss as mlx_lm_loss

from lora_one.backends.interface import IGNORED
from lora_one.errors import BatchError

LossFn = Callable[[nn.Module, Any], mx.array]


def default_loss(model: nn.Module, batch: Any) -> mx.array:
    """Return the mean loss over the tokens of a batch, which has one of two forms.

    - (tokens, lengths), as `mlx_lm.tuner.trainer.iterate_batches` yields them: mlx-lm's own `default_loss`.
    - {"input_ids": ..., "labels": ...}, as in transformers: position i predicts label i + 1, -100 does not count.

    Raises:
        BatchError: the batch has neither form.
    """
    if isinstance(batch, Mapping) and {"input_ids", "labels"} <= batch.keys():
        return _labels_loss(model, batch)
    if isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(x, mx.array) for x in batch):
        return mlx_lm_loss(model, *batch)[0]
    got = f"a mapping of {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
    raise BatchError(
        "without loss_fn a batch must be (tokens, lengths), as mlx-lm's iterate_batches yields it, or a mapping with "
        f"input_ids and labels, got {got}: pass loss_fn=(model, batch) -> mean loss"
    )


def _labels_loss(model: nn.Module, batch: Mapping[str, mx.array]) -> mx.array:
    attended = batch.get("attention_mask")
    if attended is not None and bool(mx.any(attended[:, 1:] > attended[:, :-1]).item()):
        raise BatchError("attention_mask must be padding on the right, got padding on the left or in the middle")
    labels = batch["labels"][:, 1:]
    counts = labels != IGNORED
    logits = model(batch["input_ids"])[:, :-1].astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, mx.where(counts, labels, 0))  # (sequences, positions)
    return mx.sum(losses * counts) / mx.sum(counts)


def to_mlx(batch: Any) -> Any:
    """Return the batch with its NumPy arrays as MLX arrays; everything else stays as it is."""
    if isinstance(batch, Mapping):
        return {key: to_mlx(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and any(isinstance(x, np.ndarray) for x in batch):
        return tree_map(lambda x: mx.array(x) if isinstance(x, np.ndarray) else x, batch)
    return mx.array(batch) if isinstance(batch, np.ndarray) else batch


def check_scalar(loss: Any, index: int) -> mx.array:
    """Return the loss as (). Raise BatchError if it is no scalar. Batches count from 1."""
    if not isinstance(loss, mx.array) or loss.size != 1:
        got = f"shape {loss.shape}" if isinstance(loss, mx.array) else type(loss).__name__
        raise BatchError(f"batch {index}: the loss must be a scalar array, got {got}: return the mean over the batch")
    return loss.reshape(())
