"""Plain data -> dataclasses whose fields have the types that they declare."""

import typing
from collections.abc import Callable
from typing import Any, TypeVar

from lora_one.checks import shown

_Plain = TypeVar("_Plain")


def typed(cls: type[_Plain], values: Any) -> _Plain:
    """Return an instance of a dataclass whose fields have the types that it declares.

    Raises:
        TypeError: a field is missing, unknown, or of another type.
    """
    instance = cls(**values)
    for name, hint in typing.get_type_hints(cls).items():
        if not _has_type(getattr(instance, name), hint):
            raise TypeError(f"{name} cannot be {shown(getattr(instance, name))}")
    return instance


def _has_type(value: object, hint: Any) -> bool:
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin is Callable:
        return callable(value)
    if origin is list:
        return isinstance(value, list) and all(_has_type(item, arguments[0]) for item in value)
    if arguments:  # a union
        return any(_has_type(value, member) for member in arguments)
    if hint in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, hint)
