"""Each layer's product, summed over the batches of a pass, and which layers took part."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from lora_one.core.gradient import RowProduct

from .distributed import is_parallel
from .tap import whole


class Sums:
    """What the taps and LoRA's own gradients of one pass come to.

    Args:
        consume: gets a layer's mean.
        early: whether it may get that in the last backward pass, as soon as it is whole: then with one batch never more
            than one full gradient exists. Not for a layer whose factors are read beside its calls.
    """

    def __init__(self, consume: Callable[[str, Any], None], early: bool):
        self.seen: set[str] = set()  # layers that were called, or whose factors were read
        self.read: set[str] = set()  # those whose factors were read
        self._consume = consume
        self._early = early and not is_parallel()
        self.left: dict[str, Any] = {}  # sums that are not handed on yet
        self._calls: Counter[str] = Counter()  # of a layer, in this batch's forward pass; a shared layer has several
        self._last = False
        self._batches = 0

    def next_batch(self, last: bool) -> None:
        """Its forward pass has run, its backward pass follows."""
        self._last, self._batches = last, self._batches + 1

    def end_batch(self) -> None:
        """All products of the batch are there."""
        self._calls.clear()

    def called(self, name: str, recorded: bool) -> None:
        """In a forward pass; `recorded` if a product follows."""
        self.seen.add(name)
        self._calls[name] += recorded

    def add(self, name: str, product: Any) -> None:
        """A product of one call of a layer."""
        if isinstance(product, RowProduct):
            alone = self._last and self._batches == 1 and self._calls[name] == 1 and name not in self.left
            product = product if alone and product.is_smaller else whole(product)
        self._add(name, product)
        self._calls[name] -= 1
        if self._early and self._last and self._calls[name] == 0:
            total = self.left.pop(name)
            self._consume(name, total if self._batches == 1 else total / self._batches)

    def add_read(self, name: str, product: Any) -> None:
        """What the reading of a layer's factors adds to its products."""
        self.noticed(name)
        self._add(name, product)

    def noticed(self, name: str, _: Any = None) -> None:
        """Somebody reads a layer's factors."""
        self.seen.add(name)
        self.read.add(name)

    def _add(self, name: str, product: Any) -> None:
        self.left[name] = self.left[name].add_(product) if name in self.left else product
