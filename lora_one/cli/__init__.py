"""The `lora-one` command."""

from .commands import main

__all__ = ["main"]
