"""What becomes of a call in one of several processes."""

from collections.abc import Callable


def outcome(call: Callable[[], object]) -> tuple[str, str]:
    """Return the class of the error, and its message; empty if there is none."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def error_of(call: Callable[[], object]) -> str:
    """Return both in one text."""
    return ": ".join(filter(None, outcome(call)))
