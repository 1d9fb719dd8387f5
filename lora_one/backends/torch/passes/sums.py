"""Each layer's product, summed over the batches of a pass, and which layers took part."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_one.core.gradient import RowProduct

from .distributed import is_parallel
from .loss_scale import LossScale
from .tap import whole


class Sums:
    """What the taps and LoRA's own gradients of one pass come to.

    A backward pass may have to be run again: then what it has added is passed over.

    Args:
        consume: gets a layer's mean.
        early: whether it may get that in the last backward pass, as soon as it is whole: then with one batch never more
            than one full gradient exists. Not for a layer whose factors are read beside its calls.
        scale: of the losses.
    """

    def __init__(self, consume: Callable[[str, Any], None], early: bool, scale: LossScale):
        self.seen: set[str] = set()  # layers that were called, or whose factors were read
        self.read: set[str] = set()  # those whose factors were read
        self._consume = consume
        self._early = early and not is_parallel()
        self.left: dict[str, Any] = {}  # sums that are not handed on yet
        self._scale = scale
        self._calls: Counter[str] = Counter()  # of a layer, in this batch's forward pass; a shared layer has several
        self._there: Counter[tuple[str, bool]] = Counter()  # products of this batch that are in the sums
        self._passed: Counter[tuple[str, bool]] = Counter()  # those of them that this backward pass has formed again
        self._last = False
        self._batches = 0

    def next_batch(self, last: bool) -> None:
        """Its passes follow."""
        self._last, self._batches = last, self._batches + 1
        self._there.clear()

    def next_attempt(self) -> None:
        """A forward pass follows, and its backward pass."""
        self._calls.clear()
        self._passed.clear()

    def called(self, name: str, recorded: bool) -> None:
        """In a forward pass; `recorded` if a product follows."""
        self.seen.add(name)
        self._calls[name] += recorded

    def add(self, name: str, product: Any, dy: Tensor) -> None:
        """A product of one call of a layer, and the gradient of the layer's output that it is of."""
        takes = self._scale.takes(name, dy) and self._is_new(name, read=False)
        if takes:
            if isinstance(product, RowProduct):
                alone = self._last and self._batches == 1 and self._calls[name] == 1 and name not in self.left
                product = product if alone and product.is_smaller else whole(product)
            self._add(name, product)
        self._calls[name] -= 1
        if takes and self._early and self._last and self._calls[name] == 0:
            total = self.left.pop(name)
            self._consume(name, total if self._batches == 1 else total / self._batches)

    def add_read(self, name: str, product: Any, gradient: Tensor) -> None:
        """What the reading of a layer's factors adds to its products, and the factor's gradient that it is of."""
        self.noticed(name)
        if self._scale.takes(name, gradient, is_output=False) and self._is_new(name, read=True):
            self._add(name, product)

    def noticed(self, name: str, *_: Any) -> None:
        """Somebody reads a layer's factors."""
        self.seen.add(name)
        self.read.add(name)

    def _is_new(self, name: str, read: bool) -> bool:
        """Whether no earlier attempt at this batch has added it."""
        key = name, read
        self._passed[key] += 1
        if self._passed[key] <= self._there[key]:
            return False
        self._there[key] += 1
        return True

    def _add(self, name: str, product: Any) -> None:
        scale = self._scale.value
        if scale != 1.0:  # exact: it is a power of two, and products have float32's range
            # The rows are the backward pass's own where they are float32 already.
            rows = isinstance(product, RowProduct)
            product = product._replace(dy=product.dy / scale) if rows else product.div_(scale)
        self.left[name] = self.left[name].add_(product) if name in self.left else product
