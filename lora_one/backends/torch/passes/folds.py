"""The running SVD of each layer's gradient, renewed in the backward pass: see `lora_one.core.fold`.

A renewal of a small batch costs as much as its passes through the layer. So rows wait, over as many batches as it
takes, until they need half of the memory of the layer's gradient, and a few MiB at least. On a GPU layers of equal
shape are renewed together, after the backward pass or when too much waits: one layer alone would cost as many launches
as all of them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_one.backends.checks import AGAINST_OVERFLOW
from lora_one.backends.torch.linalg.precision import widened
from lora_one.core.fold import FoldState, fold
from lora_one.core.gradient import RowProduct
from lora_one.core.ops import Ops
from lora_one.core.stacking import stack_of, unstacked
from lora_one.errors import GradientError

SHARE_OF_GRADIENT = 0.5  # of the bytes of G in float32: what a layer's rows may need before they are folded
LEAST_BYTES = 2**22  # what they may need in any case: a thousand tokens of a layer 512 wide
WAITING_BYTES = 6 * 2**30  # of all rows, on a GPU: with one large batch they are alive anyway
WAITING_BYTES_RECOMPUTED = 2**30  # where activations are recomputed, nothing else keeps the rows


class Folds:
    """A collector that folds rows, see `Collector`.

    Attributes:
        states: layer -> its state.
        reached: layers that a gradient has reached.

    Args:
        kinds: layer -> a key that is the same for the layers that are renewed together.
        in_stacks: whether layers wait for others of their kind.
        recomputes: says whether activations are recomputed in the batch that runs.
    """

    def __init__(
        self,
        ops: Ops,
        states: dict[str, FoldState],
        kinds: Mapping[str, Hashable],
        in_stacks: bool,
        recomputes: Callable[[], bool] = lambda: False,
    ):
        self.states = states
        self.reached: set[str] = set()
        self._ops = ops
        self._kinds = kinds
        self._in_stacks = in_stacks
        self._recomputes = recomputes
        self._rows: dict[str, list[RowProduct]] = {}
        self._bytes: Counter[str] = Counter()  # of a layer's rows
        self._batch = 0
        self._last = False

    def next_batch(self, last: bool) -> None:
        self._batch, self._last = self._batch + 1, last

    def add(self, name: str, product: RowProduct, is_only: bool) -> None:
        self.reached.add(name)
        self._rows.setdefault(name, []).append(product)
        self._bytes[name] += sum(0 if x.is_sparse else x.nbytes for x in product)
        if not self._in_stacks and self._is_due(name):
            self._fold([name])
        most = WAITING_BYTES_RECOMPUTED if self._recomputes() else WAITING_BYTES
        while self._in_stacks and self._bytes.total() > most:
            self._fold(max(groups(self._rows, self._kinds), key=lambda names: sum(self._bytes[n] for n in names)))

    def complete(self, name: str) -> None:
        if self._last and not self._in_stacks and name in self._rows:
            self._fold([name])

    def end_batch(self) -> None:
        for names in groups(self._rows, self._kinds):
            if self._last or any(map(self._is_due, names)):
                self._fold(names)

    def _is_due(self, name: str) -> bool:
        state = self.states[name]
        return self._bytes[name] >= max(LEAST_BYTES, SHARE_OF_GRADIENT * 4 * state.u.shape[0] * state.v.shape[0])

    def _fold(self, names: list[str]) -> None:
        """Renew the states of some layers of one kind by the rows that wait."""
        gradient = _stacked([_joined(self._rows.pop(name)) for name in names])
        for name in names:
            del self._bytes[name]
        before = stack_of(self._ops, [self.states[name] for name in names])
        try:
            after = fold(self._ops, before, gradient)
        except torch.linalg.LinAlgError as error:  # LAPACK's, for what is not finite
            raise GradientError(self._not_finite(names, gradient)) from error
        for name, state in zip(names, unstacked(after, len(names)), strict=True):
            self.states[name] = state

    def _not_finite(self, names: list[str], gradient: RowProduct) -> str:
        of_layers = gradient.dy if len(names) > 1 else gradient.dy[None]
        name, bad, size = names[0], 0, of_layers[0].numel()
        for layer, dy in zip(names, of_layers, strict=True):
            if count := int((~dy.isfinite()).sum()):
                name, bad = layer, count
                break
        return (
            f"layer {name!r}: its gradient is not finite up to batch {self._batch}: got {bad} of {size} entries of "
            f"dL/dy that are not, expected none; {AGAINST_OVERFLOW}"
        )


def groups(names: Iterable[str], kinds: Mapping[str, Hashable], most: int | None = None) -> list[list[str]]:
    """Return the names in lists of one kind, each of `most` names at most."""
    lists: dict[Hashable, list[str]] = defaultdict(list)
    for name in names:
        lists[kinds[name]].append(name)
    sizes = ((alike, most or len(alike)) for alike in lists.values())
    return [alike[i : i + size] for alike, size in sizes for i in range(0, len(alike), size)]


def _joined(rows: list[RowProduct]) -> RowProduct:
    return rows[0] if len(rows) == 1 else RowProduct(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def _stacked(rows: list[RowProduct]) -> RowProduct:
    """Stack rows, where fewer tokens are filled up by zeros. On a CPU all products are those of float32.

    Embeddings come alone: their rows are sparse.
    """
    if not rows[0].dy.is_cuda:
        rows = [RowProduct(*(widened(x) for x in pair)) for pair in rows]
    if len(rows) == 1:
        return rows[0]
    tokens = max(len(pair.x) for pair in rows)
    return RowProduct(*(torch.stack([_filled(x, tokens) for x in parts]) for parts in zip(*rows, strict=True)))


def _filled(x: Tensor, tokens: int) -> Tensor:
    return pad(x, (0, 0, 0, tokens - len(x)))
