"""The losses of a run as a file, which grows while the run goes on."""

import json
from pathlib import Path

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
