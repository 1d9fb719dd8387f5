"""Checkpoints of a run on disk. Each is complete or absent, so that a run killed at any moment can be resumed."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_one.errors import CheckpointError
from lora_one.files.atomic import replacing
from lora_one.report import Report

from .recipe import Recipe
from .runs import Run

FOLDER = "checkpoints"  # inside the adapter's folder
RUN_FILE = "run.json"
NEWEST_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its step, the run up to it, and the folder that holds its arrays."""

    step: int
    run: Run
    path: Path


class Checkpoints:
    """The checkpoints of a run while it is trained.

    Args:
        run: saved in its current state beside the arrays.
        out: the adapter's folder.
        every: the number of steps between two checkpoints; None writes none.
        last: the last step. It always has a checkpoint, so that a kill after the training costs no training.
        start: the checkpoint that the training continues from; None to train from the beginning.
        also: writes more files into each checkpoint.
    """

    def __init__(
        self,
        run: Run,
        out: Path,
        every: int | None,
        last: int,
        start: Checkpoint | None = None,
        also: Callable[[Path], None] | None = None,
    ):
        self.start = start
        self._also = also
        self.every = every
        self._run = run
        self.folder = out / FOLDER
        self._last = last
        self._written = [start.path] if start else []

    @property
    def done(self) -> int:
        """The number of steps that were done before the training continues."""
        return self.start.step if self.start else 0

    def due(self, step: int, stop: bool = False) -> bool:
        """Return whether a checkpoint should follow a step; `stop` if the training ends with it, early."""
        return self.every is not None and (step % self.every == 0 or step == self._last or stop) and step > self.done

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Write a checkpoint of the run after a step. At any moment the newest complete one exists.

        Args:
            step: the step that is done.
            fill: writes the model's and the optimizer's arrays into an empty folder.

        Raises:
            CheckpointError: it cannot be written. The checkpoints before it are unchanged.
        """
        target = self.folder / f"step-{step}"
        with replacing(target) as new:
            try:
                fill(new)
                if self._also is not None:
                    self._also(new)
            except RuntimeError as error:  # MLX and PyTorch raise their own errors when a disk is full
                raise OSError(str(error)) from error
            files = {file.name: _digest(file) for file in new.iterdir()}
            state = json.dumps({"files": files, "run": dataclasses.asdict(self._run)})
            (new / RUN_FILE).write_text(state, encoding="utf-8")
            # A checkpoint of an earlier run must not be mistaken for a later step of this one.
            self._remove_all_but(self._written[-(NEWEST_KEPT - 1) :])
        self._written.append(target)

    def finish(self) -> None:
        """Remove all checkpoints but the last one, with which resuming a complete run trains nothing again."""
        if self._written:
            self._remove_all_but(self._written[-1:])

    def _remove_all_but(self, kept: Sequence[Path]) -> None:
        for path in _newest_first(self.folder):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


# No step is followed by a checkpoint.
NEVER = Checkpoints(Run({}, "", versions={}), Path(), every=None, last=0)


def latest(out: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest complete checkpoint of the run whose adapter goes to `out`, or None if there is none.

    Args:
        out: the adapter's folder.
        warn: called with a message for each damaged checkpoint, which is skipped.
    """
    for path in _newest_first(out / FOLDER):
        try:
            run = _read(path)
            return Checkpoint(len(run.losses), run, path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            warn(f"{path} is damaged, and passed over: {error!r}")
    return None


def checkpoint_to_resume(recipe: Recipe, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint that a recipe asks to continue from, or None to start from the beginning.

    A script can always set `resume`: in its first run, when there is no checkpoint yet, this is only a warning.

    Raises:
        ConfigError: the run began with settings that give other numbers.
    """
    out = Path(recipe.out)
    if not recipe.resume:
        if any((out / FOLDER).glob("step-*")):
            warn(f"{out / FOLDER} has checkpoints of an earlier run: without resume they are not used")
        return None
    checkpoint = latest(out, warn)
    if checkpoint is None:
        warn(f"nothing to resume: {out / FOLDER} has no checkpoint; starting from the beginning")
        return None
    checkpoint.run.check_settings(recipe)
    for change in checkpoint.run.changed_versions():
        warn(f"{change}: from here on the last digits may be others than those of a run without a break")
    return checkpoint


def _read(path: Path) -> Run:
    state = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
    for name, digest in state["files"].items():
        if _digest(path / name) != digest:
            raise CheckpointError(f"{name} is not as it was written")
    values = state["run"]
    report = values["report"]
    evaluations = [(step, loss) for step, loss in values.get("evaluations", [])]
    run = Run(**{**values, "report": None if report is None else Report.from_dict(report), "evaluations": evaluations})
    if path.name != f"step-{len(run.losses)}":
        raise CheckpointError(f"its name does not fit its {len(run.losses)} losses")
    return run


def _newest_first(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints, complete or not."""
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
