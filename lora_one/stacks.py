"""Layers that are alike, as arrays with one more axis in front: where a device waits for launches, they go together."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from .backends.interface import Layer, Session
from .core.ops import Array, Ops


def kind(session: Session, layer: Layer) -> Hashable:
    """What layers have in common whose arrays can be stacked: all that they are, where the session stacks none."""
    if not session.stacked:
        return layer.name
    like = session.like(layer.name)
    return layer.out_features, layer.in_features, layer.rank, like.dtype, str(like.device)


def groups(session: Session) -> list[tuple[Layer, ...]]:
    """All layers, those of a kind together."""
    found: dict[Hashable, list[Layer]] = defaultdict(list)
    for layer in session.layers:
        found[kind(session, layer)].append(layer)
    return [tuple(layers) for layers in found.values()]


def stacked(ops: Ops, arrays: Sequence[Array]) -> Array:
    """(n, ...) of n arrays; of a single one itself."""
    return ops.stack(arrays) if len(arrays) > 1 else arrays[0]


def unstacked(arrays: Any, count: int) -> list[Any]:
    """A named tuple of stacked arrays (or of tuples of them, or None) as one for each of `count` layers."""
    return [of_layer(arrays, index, count) for index in range(count)]


def of_layer(arrays: Any, index: int, count: int) -> Any:
    """What such a named tuple has of one layer of `count`."""
    if count == 1:
        return arrays
    return type(arrays)(*(_at(x, index) for x in arrays))


def _at(x: Any, index: int) -> Any:
    if x is None:
        return None
    return tuple(_at(part, index) for part in x) if isinstance(x, tuple) else x[index]
