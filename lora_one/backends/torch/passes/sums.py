"""The product of each layer, summed over the batches of a pass, and which layers took part."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_one.core.gradient import RowProduct

from .distributed import is_parallel
from .loss_scale import LossScale
from .tap import whole


class Sums:
    """Sums of what the taps and LoRA's own gradients deliver in one pass.

    A backward pass may run again. What an earlier attempt at the batch has added is then skipped.

    Attributes:
        seen: layers that were called, or whose factors were read.
        read: layers whose factors were read.
        pending: sums that are not handed on yet.

    Args:
        consume: gets the mean of a layer.
        early: whether `consume` may get it within the last backward pass, as soon as it is complete. With a single
            batch there is then never more than one full gradient. Not for layers whose factors are also read.
        scale: of the losses.
    """

    def __init__(self, consume: Callable[[str, Any], None], early: bool, scale: LossScale):
        self.seen: set[str] = set()
        self.read: set[str] = set()
        self.pending: dict[str, Any] = {}
        self._consume = consume
        self._early = early and not is_parallel()
        self._scale = scale
        self._calls: Counter[str] = Counter()  # per layer, in this batch's forward pass; a shared layer has several
        self._added: Counter[tuple[str, bool]] = Counter()  # products of this batch that are in the sums
        self._formed: Counter[tuple[str, bool]] = Counter()  # products that this backward pass has formed
        self._last = False
        self._batches = 0

    def next_batch(self, last: bool) -> None:
        """Begin a batch."""
        self._last, self._batches = last, self._batches + 1
        self._added.clear()

    def next_attempt(self) -> None:
        """Begin a forward pass and its backward pass."""
        self._calls.clear()
        self._formed.clear()

    def called(self, name: str, recorded: bool) -> None:
        """Note that a forward pass called a layer; `recorded` if a product follows."""
        self.seen.add(name)
        self._calls[name] += recorded

    def add(self, name: str, product: Any, dy: Tensor) -> None:
        """Add the product of one call of a layer, which was formed from the gradient `dy` of its output."""
        counts = self._scale.takes(name, dy) and self._is_new(name, read=False)
        if counts:
            if isinstance(product, RowProduct):
                is_only = self._last and self._batches == 1 and self._calls[name] == 1 and name not in self.pending
                product = product if is_only and product.is_smaller else whole(product)
            self._add(name, product)
        self._calls[name] -= 1
        if counts and self._early and self._last and self._calls[name] == 0:
            total = self.pending.pop(name)
            self._consume(name, total if self._batches == 1 else total / self._batches)

    def add_read(self, name: str, product: Any, gradient: Tensor) -> None:
        """Add the product of one reading of a layer's factors, which was formed from the gradient of a factor."""
        self.noticed(name)
        if self._scale.takes(name, gradient, is_output=False) and self._is_new(name, read=True):
            self._add(name, product)

    def noticed(self, name: str, *_: Any) -> None:
        """Note that some code reads a layer's factors."""
        self.seen.add(name)
        self.read.add(name)

    def _is_new(self, name: str, read: bool) -> bool:
        """Return whether no earlier attempt at this batch has added the product."""
        key = name, read
        self._formed[key] += 1
        if self._formed[key] <= self._added[key]:
            return False
        self._added[key] += 1
        return True

    def _add(self, name: str, product: Any) -> None:
        scale = self._scale.value
        if scale != 1.0:  # exact: it is a power of two, and products have float32's range
            # Rows that were float32 already are the backward pass's own: they must not change.
            is_rows = isinstance(product, RowProduct)
            product = product._replace(dy=product.dy / scale) if is_rows else product.div_(scale)
        self.pending[name] = self.pending[name].add_(product) if name in self.pending else product
