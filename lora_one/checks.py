"""Checks of settings by name: the messages say what was expected and what came."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from .errors import ConfigError

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 120, 120


def shown(value: object) -> str:
    """Return a value as text for a message, in one or two lines, however deeply a file nests it."""
    return _SHORT.repr(value)


def shown_names(names: Sequence[str], most: int = 8) -> str:
    """Return the first names, separated by commas, and an ellipsis if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def check_integer(
    name: str, value: object, least: int | None = None, most: int | None = None, otherwise: str = ""
) -> None:
    """Raise ConfigError for a value that is not an integer, or out of bounds.

    Args:
        otherwise: what else the message says is allowed, such as ' or "auto"'.
    """
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or (least is not None and value < least)
        or (most is not None and value > most)
    ):
        bounds = "".join(f" {sign} {n}" for sign, n in ((">=", least), ("and <=", most)) if n is not None)
        raise ConfigError(f"{name} must be an integer{bounds}{otherwise}, got {shown(value)}")


def check_positive(name: str, value: object, otherwise: str = "") -> None:
    """Raise ConfigError for a value that is not a finite number above zero."""
    if not is_number(value) or value <= 0:
        raise ConfigError(f"{name} must be a number > 0{otherwise}, got {shown(value)}")


def check_range(name: str, value: object, low: float, high: float = math.inf, closed: bool = False) -> None:
    """Raise ConfigError for a value that is not a finite number in [low, high), or with `closed` in [low, high]."""
    if not is_number(value) or not low <= value <= high or (value == high and not closed):
        end = "]" if closed else ")"
        bounds = f"a number >= {low:g}" if math.isinf(high) else f"a number in [{low:g}, {high:g}{end}"
        raise ConfigError(f"{name} must be {bounds}, got {shown(value)}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ConfigError for a value that is none of the choices, in type and value."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise ConfigError for a value that is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {shown(value)}")


def check_text(name: str, value: object) -> None:
    """Raise ConfigError for a value that is not a string, or a blank one."""
    if not isinstance(value, str) or not value.strip():
        hint = "" if isinstance(value, str) or value is None else ": put it in quotes"
        raise ConfigError(f"{name} must be text, got {shown(value)}{hint}")


def check_texts(name: str, value: object) -> tuple[str, ...]:
    """Return a list of names as a tuple.

    Raises:
        ConfigError: the value is not a list of names; a single string is not one either.
    """
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
        raise ConfigError(f"{name} must be a list, got {shown(value)}")
    texts = tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ConfigError(f"{name} must be a list of names, got {shown(text)} in it")
    return texts


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
