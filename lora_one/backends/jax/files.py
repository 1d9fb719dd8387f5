"""Adapters of JAX models on disk."""

from typing import Any

from .nnx import remove


def merge(model: Any) -> Any:
    """See `lora_one.merge`."""
    return remove(model, merge=True)
