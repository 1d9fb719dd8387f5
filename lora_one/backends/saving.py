"""How an adapter is written into its folder, also where several processes save one model."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lora_one.checkpoint.folder import replacing_adapter
from lora_one.checkpoint.metadata import write_metadata
from lora_one.report import Report
from lora_one.report.deferred import DeferredReport

from .interface import Backend


def save_adapter(framework: Backend, model: Any, path: Path, report: Report | DeferredReport | None) -> None:
    """Write a model's adapter, which replaces the one in the folder in one step.

    A backend for several processes has a `one_writer`, a context manager that takes the model and the path, and yields
    what this process hands to the backend's `save`: the model, or what was gathered of it; None where another writes.

    Raises:
        ModelError, CheckpointError: see `lora_one.save`.
    """
    one_writer = getattr(framework, "one_writer", None)
    with nullcontext(model) if one_writer is None else one_writer(model, path) as whole:
        if whole is None:
            return
        with replacing_adapter(path) as folder:
            framework.save(whole, folder)
            write_metadata(folder, framework.ops.name, report)
