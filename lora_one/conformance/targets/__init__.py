"""The backends that come with lora-one, as targets of the suite: one module per framework."""

from .loading import DTYPES, backends, open_target

__all__ = ["DTYPES", "backends", "open_target"]
