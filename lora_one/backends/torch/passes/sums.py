"""The product of each layer, summed over the batches of a pass."""

from collections.abc import Callable
from typing import Any

from lora_one.core.gradient import RowProduct

from .tap import whole


class Sums:
    """A collector that sums.

    Attributes:
        pending: sums that are not handed on yet.

    Args:
        consume: gets the mean of a layer.
        early: whether `consume` may get it within the last backward pass, as soon as it is complete. With a single
            batch there is then never more than one full gradient. Not for layers whose factors are also read.
    """

    def __init__(self, consume: Callable[[str, Any], None], early: bool):
        self.pending: dict[str, Any] = {}
        self._consume = consume
        self._early = early
        self._last = False
        self._batches = 0

    def next_batch(self, last: bool) -> None:
        self._last, self._batches = last, self._batches + 1

    def add(self, name: str, product: Any, is_only: bool) -> None:
        if isinstance(product, RowProduct) and not (is_only and product.is_smaller):
            product = whole(product)
        self.pending[name] = self.pending[name].add_(product) if name in self.pending else product

    def complete(self, name: str) -> None:
        if self._early and self._last:
            self.hand_on(name, self._batches)

    def end_batch(self) -> None:
        pass

    def hand_on(self, name: str, batches: int) -> None:
        """Hand on the mean of a layer."""
        total = self.pending.pop(name)
        self._consume(name, total if batches == 1 else total / batches)
