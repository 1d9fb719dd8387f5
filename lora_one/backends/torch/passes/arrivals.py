"""The products of a pass that count: each call of a layer delivers one, and a backward pass may run again."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lora_one.core.gradient import RowProduct

from .loss_scale import LossScale


class Collector(Protocol):
    """What becomes of the products of a pass: their sum, or a fold of each batch."""

    def next_batch(self, last: bool) -> None:
        """Begin a batch."""
        ...

    def add(self, name: str, product: Any, is_only: bool) -> None:
        """Add a product of a layer; `is_only` if no other will come in this pass."""
        ...

    def complete(self, name: str) -> None:
        """Note that the batch has delivered all products of a layer's calls."""
        ...

    def end_batch(self) -> None:
        """End a batch: its graph is gone."""
        ...


class Postponed:
    """A collector whose errors wait until the batch is over."""

    def __init__(self, collector: Collector):
        self._collector = collector
        self._error: Exception | None = None

    def next_batch(self, last: bool) -> None:
        self._collector.next_batch(last)

    def add(self, name: str, product: Any, is_only: bool) -> None:
        self._keep(lambda: self._collector.add(name, product, is_only))

    def complete(self, name: str) -> None:
        self._keep(lambda: self._collector.complete(name))

    def end_batch(self) -> None:
        if self._error is not None:
            raise self._error
        self._collector.end_batch()

    def _keep(self, call: Callable[[], None]) -> None:
        try:
            if self._error is None:
                call()
        except Exception as error:
            self._error = error


class Arrivals:
    """Takes what the taps and LoRA's own gradients deliver, and hands on what counts, at the loss's own scale.

    Attributes:
        seen: layers that were called, or whose factors were read.
        read: layers whose factors were read.
    """

    def __init__(self, collector: Collector, scale: LossScale):
        self.seen: set[str] = set()
        self.read: set[str] = set()
        self._collector = collector
        self._scale = scale
        self._calls: Counter[str] = Counter()  # per layer, in this batch's forward pass; a shared layer has several
        self._added: Counter[tuple[str, bool]] = Counter()  # products of this batch that were handed on
        self._formed: Counter[tuple[str, bool]] = Counter()  # products that this backward pass has formed
        self._batches = 0
        self._last = False

    def next_batch(self, last: bool) -> None:
        """Begin a batch."""
        self._batches, self._last = self._batches + 1, last
        self._added.clear()
        self._collector.next_batch(last)

    def next_attempt(self) -> None:
        """Begin a forward pass and its backward pass."""
        self._calls.clear()
        self._formed.clear()

    def end_batch(self) -> None:
        """End a batch."""
        self._collector.end_batch()

    def called(self, name: str, recorded: bool) -> None:
        """Note that a forward pass called a layer; `recorded` if a product follows."""
        self.seen.add(name)
        self._calls[name] += recorded

    def add(self, name: str, product: Any, dy: Tensor) -> None:
        """Take the product of one call of a layer, which was formed from the gradient `dy` of its output."""
        counts = self._scale.takes(name, dy) and self._is_new(name, read=False)
        if counts:
            is_first = self._added[name, False] == 1 and not self._added[name, True]
            is_only = self._last and self._batches == 1 and self._calls[name] == 1 and is_first
            self._collector.add(name, self._unscaled(product), is_only)
        self._calls[name] -= 1
        if counts and self._calls[name] == 0:
            self._collector.complete(name)

    def add_read(self, name: str, product: Any, gradient: Tensor) -> None:
        """Take the product of one reading of a layer's factors, which was formed from the gradient of a factor."""
        self.noticed(name)
        if self._scale.takes(name, gradient, is_output=False) and self._is_new(name, read=True):
            self._collector.add(name, self._unscaled(product), False)

    def noticed(self, name: str, *_: Any) -> None:
        """Note that some code reads a layer's factors."""
        self.seen.add(name)
        self.read.add(name)

    def _is_new(self, name: str, read: bool) -> bool:
        """Return whether no earlier attempt at this batch has handed the product on."""
        key = name, read
        self._formed[key] += 1
        if self._formed[key] <= self._added[key]:
            return False
        self._added[key] += 1
        return True

    def _unscaled(self, product: Any) -> Any:
        scale = self._scale.value
        if scale == 1.0:
            return product
        if isinstance(product, RowProduct):
            return product._replace(dy=_wide_quotient(product.dy, scale))
        return product.div_(scale)


def _wide_quotient(dy: Tensor, scale: float) -> Tensor:
    """Return dy / scale; the scale is a power of two, and float32 has the range for it."""
    return dy / scale if dy.dtype.itemsize > 2 else dy.float().div_(scale)
