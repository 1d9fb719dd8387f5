"""The rates of this machine, measured in a second or two; one module per framework."""

from .choice import choose, measured

__all__ = ["choose", "measured"]
