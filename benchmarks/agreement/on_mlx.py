"""mlx-lm."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from lora_one.backends.mlx import load_pretrained
from lora_one.backends.mlx.passes.batches import default_loss
from lora_one.core.factors import Factors

from .job import Batch
from .record import Step


class Runner:
    """See `benchmarks.agreement.record.Framework`."""

    name = "mlx"
    loss_fn = None

    def __init__(self, dtype: str):
        self._dtype = getattr(mx, dtype)

    def precision(self) -> Any:
        return nullcontext()

    def open(self, folder: Path) -> Any:
        model, _ = load_pretrained(folder)
        model.set_dtype(self._dtype)
        return model

    def batch(self, batch: Batch) -> dict[str, mx.array]:
        return {name: mx.array(value) for name, value in batch.items()}

    def weights(self, model: Any) -> dict[str, np.ndarray]:
        return _arrays(model.parameters())

    def evaluate(self, model: Any, batch: dict[str, mx.array]) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        model.unfreeze()
        loss, gradients = nn.value_and_grad(model, default_loss)(model, batch)
        return np.array(model(batch["input_ids"])), loss.item(), _arrays(gradients)

    def factors(self, model: Any) -> dict[str, Factors]:
        return _factors(model.trainable_parameters())

    def train(self, model: Any, optimizer: Any, batches: list[dict[str, mx.array]]) -> Iterator[Step]:
        differentiate = nn.value_and_grad(model, default_loss)
        for batch in batches:
            loss, gradients = differentiate(model, batch)
            optimizer.update(model, gradients)
            yield Step(loss.item(), _factors(gradients), self.factors(model))


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def _factors(tree: Any) -> dict[str, Factors]:
    leaves = _arrays(tree)
    layers = [name.removesuffix(".lora_a") for name in leaves if name.endswith(".lora_a")]
    return {name: Factors(leaves[f"{name}.lora_a"].T, leaves[f"{name}.lora_b"].T) for name in layers}
