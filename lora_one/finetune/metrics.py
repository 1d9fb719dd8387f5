"""The losses of a run as a file, which grows while the run goes on."""

import json
from pathlib import Path
from typing import NamedTuple

from lora_one.errors import DataError

from .runs import Run

METRICS = "metrics.jsonl"


class MetricsFile:
    """The file metrics.jsonl in a run's folder: an object a line, with "step" and "loss" or "eval_loss".

    Args:
        out: the run's folder.
        run: what is known when the run begins, or goes on.
    """

    def __init__(self, out: Path, run: Run):
        evaluations = dict(run.evaluations)
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / METRICS
        self._path.write_text("", encoding="utf-8")
        if run.validation is not None:
            self.write(0, eval_loss=run.validation)
        for step, loss in enumerate(run.losses, start=1):
            self.write(step, loss=loss)
            if step in evaluations:
                self.write(step, eval_loss=evaluations[step])

    def write(self, step: int, **values: float) -> None:
        """Add a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


class Losses(NamedTuple):
    """The losses of a run: pairs of a step and a loss. Step 0 is before the training."""

    training: list[tuple[int, float]]
    held_out: list[tuple[int, float]]


def read_losses(folder: Path) -> Losses:
    """Read the losses of a run from its folder; there are none if it has no metrics.jsonl.

    Raises:
        DataError: a line is not one of metrics.jsonl. The last line may be cut short, as where a run was killed.
    """
    file = folder / METRICS
    losses = Losses([], [])
    if not file.is_file():
        return losses
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
            if "loss" in entry:
                losses.training.append((step, float(entry["loss"])))
            if "eval_loss" in entry:
                losses.held_out.append((step, float(entry["eval_loss"])))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(
                f'{file}, line {number}: must be an object with "step" and "loss" or "eval_loss", got {line!r:.80}: '
                "remove the file to go on without it"
            ) from error
    return losses
