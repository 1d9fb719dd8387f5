"""Equal arrays of several layers as one array with a leading axis, and back."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from .ops import Array, Ops

Arrays = TypeVar("Arrays", bound=NamedTuple)  # a named tuple of arrays, of tuples of arrays, or of None


def stacked(ops: Ops, arrays: Sequence[Array]) -> Array:
    """Stack n arrays into one, (n, ...). A single array is returned as it is."""
    return ops.stack(arrays) if len(arrays) > 1 else arrays[0]


def stack_of(ops: Ops, tuples: Sequence[Arrays]) -> Arrays:
    """Stack n named tuples of arrays into one named tuple of stacked arrays."""
    return type(tuples[0])._make(stacked(ops, arrays) for arrays in zip(*tuples, strict=True))


def unstacked(stack: Arrays, count: int) -> list[Arrays]:
    """Split a named tuple of stacked arrays into `count` named tuples: the inverse of `stack_of`."""
    return [one_of(stack, index, count) for index in range(count)]


def one_of(stack: Arrays, index: int, count: int) -> Arrays:
    """Take one of the `count` named tuples that a stack consists of."""
    if count == 1:
        return stack
    return type(stack)._make(_at(field, index) for field in stack)


def _at(field: Any, index: int) -> Any:
    if field is None:
        return None
    if not isinstance(field, tuple):
        return field[index]
    parts = [_at(part, index) for part in field]
    return type(field)(*parts) if hasattr(field, "_fields") else tuple(parts)
