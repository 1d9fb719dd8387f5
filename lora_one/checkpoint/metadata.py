"""`lora_one.json`, beside an adapter: what made the adapter, and the report of its start."""

import json
from pathlib import Path

from lora_one.environment import installed_versions
from lora_one.errors import CheckpointError
from lora_one.files.json_files import read_object
from lora_one.report import Report
from lora_one.report.deferred import DeferredReport

from .folder import METADATA, is_file

_PACKAGES = (
    "lora-one",
    "numpy",
    "safetensors",
    "torch",
    "peft",
    "transformers",
    "jax",
    "flax",
    "optax",
    "mlx",
    "mlx-lm",
)


def write_metadata(path: Path, backend: str, report: Report | DeferredReport | None) -> None:
    """Write `lora_one.json`: the report with its configuration, and the versions of the packages in use."""
    versions = installed_versions(_PACKAGES)
    metadata = {"backend": backend, "versions": versions, "report": None if report is None else report.to_dict()}
    (path / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")


def read_report(path: Path) -> Report | DeferredReport:
    """Read the report that is kept in an adapter folder.

    Raises:
        CheckpointError: lora-one did not write the folder, or wrote it without a report.
    """
    file = path / METADATA
    if not is_file(file):
        raise CheckpointError(f"{path} has no {METADATA}: lora-one did not write it")
    metadata = read_object(file)
    if "report" not in metadata:
        raise CheckpointError(f'{file} cannot be read: it has no "report"')
    report = metadata["report"]
    if report is None:
        raise CheckpointError(f"{path} was saved without a report: pass it to lora_one.save(model, path, report)")
    deferred = isinstance(report, dict) and "start_steps" in report
    return DeferredReport.from_dict(report) if deferred else Report.from_dict(report)
