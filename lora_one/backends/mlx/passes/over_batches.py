"""Passes over all batches: forward for the mean loss, backward for the rows of each layer."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lora_one.backends.checks import check_finite_loss, with_last
from lora_one.backends.interface import Layer, PassResult
from lora_one.backends.mlx.attach import Site
from lora_one.backends.mlx.layout import EMBEDDINGS, base_of
from lora_one.backends.mlx.ops import MlxOps
from lora_one.backends.mlx.processes import Processes
from lora_one.core.gradient import RowProduct

from .batches import LossFn, check_scalar, to_mlx
from .distributed import mean_over_processes
from .loss_scale import LossScale, Summaries, summary
from .tap import Call, EmbeddingTap, Tap, rows_of

OPS = MlxOps()

Consume = Callable[[Layer, RowProduct, bool], None]  # the bool says whether this is the last batch
_Calls = dict[str, list[Call]]  # by site, in the order of the backward pass


@dataclass(frozen=True)
class Passes:
    """Runs passes over the batches of a session."""

    model: nn.Module
    sites: Mapping[str, Site]  # by path
    batches: Iterable[Any]
    loss_fn: LossFn
    device: mx.Device  # the user's default, on which the model runs
    scale: LossScale
    processes: Processes

    def forward(self) -> PassResult:
        """Run all batches forward."""
        total, count = 0.0, 0
        for batch, _ in with_last(self.batches):
            count += 1
            with mx.stream(self.device):
                loss = self._loss(to_mlx(batch), count)
            total += check_finite_loss(float(np.array(loss)), count)
        return self._result(total, count)

    def backward(self, consume: Consume) -> PassResult:
        """Run all batches backward, and hand on the rows of each layer that a token reached, in float32 or wider.

        The rows are not evaluated. If `consume` evaluates what it makes of them, and keeps nothing else, one layer's
        work is in memory after the other's.
        """
        total, count = 0.0, 0
        for batch, is_last in with_last(self.batches):
            count += 1
            if not self.scale.is_fitted:
                self.scale.fit(partial(self._summaries, batch, count))
            with self._recorded(batch, count, self.scale.value) as (loss, calls):
                total += check_finite_loss(float(np.array(loss)), count)
                for layer, rows in self._rows(calls, self.scale.value):
                    consume(layer, rows, is_last)
        if not self.scale.is_fitted:
            self.scale.finish()
        return self._result(total, count)

    def _loss(self, batch: Any, number: int) -> mx.array:
        return check_scalar(self.loss_fn(self.model, batch), number)

    @contextmanager
    def _recorded(self, batch: Any, number: int, scale: float) -> Iterator[tuple[mx.array, _Calls]]:
        """Give a batch's loss, and all layers' calls, whose dy are multiplied by the scale. Nothing is evaluated."""
        calls: _Calls = defaultdict(list)
        try:
            with ExitStack() as stack:
                taps = {path: stack.enter_context(_tapped(site, calls)) for path, site in self.sites.items()}

                # `batch` is an argument, so that what the user has compiled is traced again, with these taps.
                def loss_of(anchors: dict[str, mx.array], batch: Any) -> tuple[mx.array, mx.array]:
                    for path, anchor in anchors.items():
                        taps[path].anchor = anchor
                    loss = self._loss(batch, number)
                    return (loss if scale == 1.0 else OPS.at_least_float32(loss) * scale), loss

                with mx.stream(self.device):
                    anchors = {path: tap.anchor for path, tap in taps.items()}
                    (_, loss), _ = mx.value_and_grad(loss_of)(anchors, to_mlx(batch))
            yield loss, calls
        finally:
            calls.clear()  # the taps hold the calls, and the calls' graphs hold the taps: no collector sees that

    def _rows(self, calls: _Calls, scale: float) -> Iterator[tuple[Layer, RowProduct]]:
        """Yield the rows of all layers that a token reached, in the order of the backward pass. `calls` is emptied."""
        for path in list(calls):
            site = self.sites[path]
            dtype = OPS.at_least_float32(site.module.lora_a).dtype
            for index, rows in rows_of(calls.pop(path), len(site.layers), dtype, scale):
                yield site.layers[index], rows

    def _summaries(self, batch: Any, number: int, scale: float) -> Summaries:
        with self._recorded(batch, number, scale) as (loss, calls):
            check_finite_loss(float(np.array(loss)), number)
            return {layer.name: np.array(summary(rows)) for layer, rows in self._rows(calls, scale)}

    def _result(self, total: float, count: int) -> PassResult:
        self.processes.meet()  # nobody waits in a sum for a process that has failed
        return PassResult(*mean_over_processes(total, count), self.scale.rounded_away)


@contextmanager
def _tapped(site: Site, calls: _Calls) -> Iterator[Tap]:
    """Temporarily replace a LoRA layer by a tap, which computes only W x."""
    base, record = base_of(site.module), lambda call: calls[site.path].append(call)
    is_table = isinstance(base, EMBEDDINGS)
    tap: Any = EmbeddingTap(base, site.layers[0].in_features, record) if is_table else Tap(base, record)
    site.place.container[site.place.key] = tap
    try:
        yield tap
    finally:
        site.place.container[site.place.key] = site.module
