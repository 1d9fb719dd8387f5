"""How a folder is written where several processes save one model."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lora_one.checkpoint.folder import replacing_adapter

from .interface import Backend


@contextmanager
def saving(framework: Backend, model: Any, path: Path) -> Iterator[Path | None]:
    """Yield an empty folder to write an adapter into; at the end it replaces the adapter in `path` in one step.

    Yield None where another process writes the same folder: a backend for several processes has a `one_writer`, a
    context manager that takes the model and the path, and yields whether this process writes.

    Raises:
        CheckpointError: see `lora_one.files.atomic.replacing`.
    """
    one_writer = getattr(framework, "one_writer", None)
    with (
        nullcontext(True) if one_writer is None else one_writer(model, path) as writes,
        replacing_adapter(path) if writes else nullcontext() as folder,
    ):
        yield folder
