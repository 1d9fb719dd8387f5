"""Adapters of JAX models on disk."""

from typing import Any

from flax import nnx

from .nnx import remove
from .trees import merged


def merge(model: Any) -> Any:
    """See `lora_one.merge`."""
    return remove(model, merge=True) if isinstance(model, nnx.Module) else merged(model)
