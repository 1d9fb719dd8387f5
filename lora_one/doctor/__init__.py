"""`lora-one doctor`: the frameworks and devices that work on this machine."""

from .examination import describe, examine

__all__ = ["describe", "examine"]
