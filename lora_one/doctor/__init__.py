"""`lora-one doctor`: which frameworks and devices work here."""

from .examination import describe, examine

__all__ = ["describe", "examine"]
