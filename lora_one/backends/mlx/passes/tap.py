"""The rows x and dy of a linear layer, whose product dy^T x is the gradient of its weight.

A tap replaces a LoRA layer. It returns the base layer's output unchanged, and its backward pass records x and dy, as
arrays that are not evaluated yet. Weights may be frozen or quantised. A layer that is called several times in one
forward pass has several records. Checkpointed blocks repeat the forward pass only, so nothing is recorded twice.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lora_one.backends.mlx.one_hot import OneHot
from lora_one.core.gradient import RowProduct


class Call(NamedTuple):
    """One call of a layer, as its backward pass saw it."""

    dy: mx.array  # (..., out), dL/dy
    x: mx.array  # (..., in)
    experts: mx.array | None = None  # (...), the expert of each row, in a mixture of experts
    tokens: int | None = None  # of the table that x, (...), looks up


class Tap(nn.Module):
    """A base layer, dense or a mixture of experts, that hands each `Call` to `record` in the backward pass."""

    def __init__(self, linear: Any, record: Callable[[Call], None]):
        super().__init__()
        self.linear = linear
        self.anchor = mx.zeros(())  # never read: the backward pass of its gradient passes through the tap
        self._recorded = _recording(record)

    def __call__(self, x: mx.array, experts: mx.array | None = None, sorted_indices: bool = False) -> mx.array:
        if experts is None:
            y: Any = self._recorded(self.linear(x), self.anchor, mx.stop_gradient(x))
            return y
        y = self.linear(x, experts, sorted_indices=sorted_indices)  # (..., rows, out)
        x = mx.broadcast_to(mx.stop_gradient(x), (*y.shape[:-1], x.shape[-1]))
        y = self._recorded(y, self.anchor, x, mx.broadcast_to(experts[..., None], y.shape[:-1]))
        return y


class EmbeddingTap(nn.Module):
    """An embedding that hands each `Call` to `record` in the backward pass. W, (dim, tokens), is its table transposed.

    Where it is the output layer too, its logits are x^T W, so that x is in the place of dy, and dL/dlogits in x's.
    """

    def __init__(self, embedding: Any, tokens: int, record: Callable[[Call], None]):
        super().__init__()
        self.embedding = embedding
        self.anchor = mx.zeros(())
        self._looked_up = _recording(lambda call: record(call._replace(tokens=tokens)))
        self._multiplied = _recording(lambda call: record(Call(call.x, call.dy)))

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self._looked_up(self.embedding(x), self.anchor, x)
        return y

    def as_linear(self, x: mx.array) -> mx.array:
        y: mx.array = self._multiplied(self.embedding.as_linear(x), self.anchor, mx.stop_gradient(x))
        return y


def rows_of(calls: Sequence[Call], pairs: int, dtype: mx.Dtype, scale: float) -> Iterator[tuple[int, RowProduct]]:
    """Yield the index of each pair that a token reached, and the rows of all calls together.

    Args:
        calls: of one layer, at least one.
        pairs: those of the layer, one or one per expert.
        dtype: that of the rows.
        scale: that of the loss, which is divided out of dy.
    """
    for call in calls:
        if call.tokens is not None:
            dy, index = call.dy.reshape(-1, call.dy.shape[-1]), call.x.reshape(-1)
            yield 0, RowProduct(dy.astype(dtype) / scale, OneHot(index, call.tokens, dtype))
    calls = [call for call in calls if call.tokens is None]
    if not calls:
        return
    dy, x = _rows([call.dy for call in calls]), _rows([call.x for call in calls])
    experts = [np.array(call.experts).reshape(-1) for call in calls if call.experts is not None]
    if not experts:
        yield 0, RowProduct(dy.astype(dtype) / scale, x.astype(dtype))
        return
    expert_of_row = np.concatenate(experts)
    for pair in range(pairs):
        chosen = np.flatnonzero(expert_of_row == pair)
        if chosen.size:
            index = mx.array(chosen)
            yield pair, RowProduct(dy[index].astype(dtype) / scale, x[index].astype(dtype))


def _rows(arrays: list[mx.array]) -> mx.array:
    return mx.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays])


def _recording(record: Callable[[Call], None]) -> Any:
    """Return a function of a layer's output that returns it, and records its gradient in the backward pass."""

    @mx.custom_function
    def recorded(y: mx.array, anchor: mx.array, *inputs: mx.array) -> mx.array:
        return y

    @recorded.vjp
    def recorded_vjp(primals: Any, dy: mx.array, y: mx.array) -> Any:
        record(Call(dy, *primals[2:]))
        return dy, *map(mx.zeros_like, primals[1:])

    return recorded
