"""Checks of settings by name: what came, what was expected."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 120, 120


def shown(value: Any) -> str:
    """A value as it stands in a message: what a file nests without end takes no more than a line or two."""
    return _SHORT.repr(value)


def check_integer(
    name: str, value: Any, least: int | None = None, most: int | None = None, otherwise: str = ""
) -> None:
    """Raises ConfigError for what is no integer, or out of bounds."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (least is not None and value < least) or (most is not None and value > most):
        bounds = "".join(f" {sign} {n}" for sign, n in ((">=", least), ("and <=", most)) if n is not None)
        raise ConfigError(f"{name} must be an integer{bounds}{otherwise}, got {shown(value)}")


def check_positive(name: str, value: Any, otherwise: str = "") -> None:
    """Raises ConfigError for what is no number, not finite, or not above zero."""
    if not is_number(value) or value <= 0:
        raise ConfigError(f"{name} must be a number > 0{otherwise}, got {shown(value)}")


def check_range(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raises ConfigError for what is no number, or not in [low, high)."""
    if not is_number(value) or not low <= value < high:
        bounds = f"a number >= {low:g}" if math.isinf(high) else f"a number in [{low:g}, {high:g})"
        raise ConfigError(f"{name} must be {bounds}, got {shown(value)}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ConfigError for what is none of the choices."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """Raises ConfigError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {shown(value)}")


def check_text(name: str, value: Any) -> None:
    """Raises ConfigError for what is no string, or has nothing in it."""
    if not isinstance(value, str) or not value.strip():
        hint = "" if isinstance(value, str) or value is None else ": put it in quotes"
        raise ConfigError(f"{name} must be text, got {shown(value)}{hint}")


def check_texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of names as a tuple. Raises ConfigError for what is none, a string alone for instance."""
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
        raise ConfigError(f"{name} must be a list, got {shown(value)}")
    found = tuple(value)
    for item in found:
        if not isinstance(item, str) or not item:
            raise ConfigError(f"{name} must be a list of names, got {shown(item)} in it")
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
