"""Sums over batches and processes of what is linear in a layer's gradient, from the layer's rows."""

import operator
from collections.abc import Callable

import mlx.core as mx

from lora_one.backends.interface import Layer
from lora_one.backends.mlx.processes import is_parallel
from lora_one.core.gradient import RowProduct

from .distributed import sum_over_processes

Arrays = tuple[mx.array, ...]
Linear = Callable[[Layer, RowProduct], Arrays]


class Sums:
    """The sum per layer; `add` is for `Passes.backward`.

    Args:
        linear: what to sum.
        is_last_lazy: whether the sums of the last batch stay unevaluated, because each is evaluated where it is used.
    """

    def __init__(self, linear: Linear, is_last_lazy: bool = False):
        self._linear = linear
        self._is_last_lazy = is_last_lazy
        self._sums: dict[str, Arrays] = {}

    def add(self, layer: Layer, rows: RowProduct, is_last: bool) -> None:
        new = self._linear(layer, rows)
        if layer.name in self._sums:
            new = tuple(map(operator.add, self._sums.pop(layer.name), new))
        if not (is_last and self._is_last_lazy):
            mx.eval(new)
        self._sums[layer.name] = new

    def pop_mean(self, layer: Layer, batches: int, like: mx.array) -> Arrays | None:
        """Return the mean over the batches of all processes; None if no process has rows of the layer.

        All processes must call this in the same order.
        """
        own = self._sums.pop(layer.name, None)
        if is_parallel():
            if own is None:
                zeros = RowProduct(
                    *(mx.zeros((1, n), dtype=like.dtype) for n in (layer.out_features, layer.in_features))
                )
                own = self._linear(layer, zeros)
            own = tuple(map(sum_over_processes, own))
        return None if own is None else tuple(x / batches for x in own)
