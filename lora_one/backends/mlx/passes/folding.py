"""The states of a fold pass: rows of layers in, and the states of all processes merged.

Renewing a state costs about as much for a few tokens as for a hundred. So the rows of small batches, and of experts
that few tokens reach, wait for those of later batches.
"""

from collections import defaultdict

import mlx.core as mx
import numpy as np

from lora_one.backends.checks import AGAINST_OVERFLOW
from lora_one.backends.interface import Layer
from lora_one.backends.mlx.one_hot import arrays_of, joined
from lora_one.backends.mlx.ops import MlxOps
from lora_one.core.fold import FoldState, fold, merge_all, of_mean
from lora_one.core.gradient import RowProduct, times
from lora_one.errors import GradientError

from .distributed import of_all_processes

OPS = MlxOps()
TOKENS_PER_DIRECTION = 4  # so many rows need at most what gradients, moments and values of LoRA's factors need


class Folding:
    """The state per layer; `add` is for `Passes.backward`.

    Args:
        states: from `start_fold`.
    """

    def __init__(self, states: dict[str, FoldState]):
        self._states = states
        self._waiting: dict[str, list[RowProduct]] = defaultdict(list)

    def add(self, layer: Layer, rows: RowProduct, is_last: bool) -> None:
        """Take in rows of a layer. Raise GradientError if their product is not finite."""
        mx.eval(arrays_of(rows))
        state, waiting = self._states[layer.name], self._waiting[layer.name]
        if not np.isfinite(np.array(times(OPS, rows, state.test))).all():  # LAPACK fails on it with a bare number
            raise GradientError(f"layer {layer.name!r}: its gradient is not finite; {AGAINST_OVERFLOW}")
        waiting.append(rows)
        if is_last or sum(len(x) for _, x in waiting) >= TOKENS_PER_DIRECTION * state.s.size:
            self._fold(layer.name)

    def _fold(self, name: str) -> None:
        """Renew a layer's state by the rows that wait, if there are any."""
        waiting = self._waiting.pop(name, [])
        if waiting:
            for rows in joined(waiting):
                self._states[name] = state = fold(OPS, self._states[name], rows)
                mx.eval(state)

    def pop_mean(self, layer: Layer, batches: int) -> FoldState | None:
        """Return the state of the mean over the batches of all processes; None if no gradient reached the layer.

        All processes must call this in the same order.
        """
        self._fold(layer.name)
        gathered = [of_all_processes(x) for x in self._states.pop(layer.name)]
        states = [FoldState(*arrays) for arrays in zip(*gathered, strict=True)]
        reached = [state for state in states if np.array(state.s)[0] != 0]  # the others have no bases yet
        return of_mean(OPS, merge_all(OPS, reached), batches) if reached else None
