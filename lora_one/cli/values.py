"""The values that a shell may complete an option's value to."""

from collections.abc import Callable, Iterable


def one_of(values: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the function by which Typer completes an option that has these values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete
