"""The loss on held-out data while a model is trained: which step was the best, and whether to stop."""

import math
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from .progress import Progress
from .recipe import Recipe
from .runs import Run
from .tuners.interface import AfterStep, Tuner

BEST = "best.safetensors"  # in a checkpoint: the trained arrays of the best step


class Validation:
    """The measurements of a run.

    Args:
        recipe: says when to measure, whether to keep the best step, and when to stop.
        run: gets the measurements; a resumed one has some.
        tuner: the model that is trained.
        batches: the held-out data.
        progress: told of each measurement.
        folder: the checkpoint that the run continues from.
    """

    def __init__(
        self, recipe: Recipe, run: Run, tuner: Tuner, batches: Any, progress: Progress, folder: Path | None = None
    ):
        self._recipe = recipe
        self._run = run
        self._tuner = tuner
        self._batches = batches
        self._progress = progress
        self._best = load_file(folder / BEST) if folder and (folder / BEST).exists() else None

    @property
    def stopped(self) -> bool:
        """Whether as many measurements as `early_stopping` says came after the best one."""
        losses = [loss for _, loss in self._run.evaluations]
        if self._recipe.early_stopping is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses, key=_as_worst)) >= self._recipe.early_stopping

    def after_step(self, step: int) -> AfterStep:
        """Measure the loss after a step if it is time to."""
        every = self._recipe.eval_every
        if every is None or (step % every and step != self._recipe.steps):
            return AfterStep()
        loss = self._tuner.mean_loss(self._batches)
        if self._recipe.keep_best and loss < min((loss for _, loss in self._run.evaluations), default=math.inf):
            self._best = self._tuner.trained_arrays()
        self._run.evaluations.append((step, loss))
        self._progress.validation(f"at step {step}", loss)
        return AfterStep(loss, self.stopped)

    def save(self, folder: Path) -> None:
        """Write the best step's arrays into a checkpoint."""
        if self._best is not None:
            save_file(self._best, folder / BEST)

    def finish(self) -> None:
        """Bring back the best step."""
        if self._best is not None:
            self._tuner.set_trained_arrays(self._best)
            step, loss = min(self._run.evaluations, key=lambda evaluation: _as_worst(evaluation[1]))
            self._progress.say(f"Back to step {step}, whose loss on held-out data was {loss:.4f}")


def _as_worst(loss: float) -> float:
    """Return the loss, or infinity for one that is not a number."""
    return math.inf if math.isnan(loss) else loss
