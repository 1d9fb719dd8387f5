"""Arrays of things that are alike as one array with one more axis in front, and back."""

from collections.abc import Sequence
from typing import Any

from .ops import Array, Ops


def stacked(ops: Ops, arrays: Sequence[Array]) -> Array:
    """(n, ...) of n arrays; of a single one itself."""
    return ops.stack(arrays) if len(arrays) > 1 else arrays[0]


def stack_of(ops: Ops, tuples: Sequence[Any]) -> Any:
    """A named tuple of stacked arrays, of n named tuples of arrays."""
    return type(tuples[0])(*(stacked(ops, arrays) for arrays in zip(*tuples, strict=True)))


def unstacked(arrays: Any, count: int) -> list[Any]:
    """A named tuple of stacked arrays (or of tuples of them, or None) as one for each of `count`."""
    return [one_of(arrays, index, count) for index in range(count)]


def one_of(arrays: Any, index: int, count: int) -> Any:
    """What such a named tuple has of one of `count`."""
    if count == 1:
        return arrays
    return type(arrays)(*(_at(x, index) for x in arrays))


def _at(x: Any, index: int) -> Any:
    if x is None:
        return None
    return tuple(_at(part, index) for part in x) if isinstance(x, tuple) else x[index]
