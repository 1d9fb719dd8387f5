"""What mlx-lm's training loop leaves to its caller."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import clip_grad_norm

from lora_one.backends.mlx.lora_adamw import LoraOneAdamW


def clipped(optimizer: LoraOneAdamW, norm: float) -> Any:
    """Return the optimizer with all gradients together clipped to a norm; 0 clips nothing."""
    return _Clipped(optimizer, norm) if norm else optimizer


class _Clipped:
    """An optimizer as mlx-lm's `train` uses one."""

    def __init__(self, optimizer: LoraOneAdamW, norm: float):
        self._optimizer = optimizer
        self._norm = norm

    @property
    def state(self) -> Any:
        return self._optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self._optimizer.state = state

    @property
    def learning_rate(self) -> mx.array:
        return self._optimizer.learning_rate

    def update(self, model: nn.Module, gradients: Any) -> None:
        self._optimizer.update(model, clip_grad_norm(gradients, self._norm)[0])


@contextmanager
def unchanged_layers(model: Any) -> Iterator[None]:
    """Undo on leaving what `grad_checkpoint` of mlx-lm does to the class of a model's layers."""
    cls: Any = type(model.layers[0])
    call = cls.__call__
    try:
        yield
    finally:
        cls.__call__ = call
