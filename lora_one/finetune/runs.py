"""A training run on disk: checkpoints that are whole or not there, so that a run killed at any moment can go on."""

import dataclasses
import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_one.environment import installed_versions
from lora_one.errors import CheckpointError, ConfigError
from lora_one.files.atomic import replacing
from lora_one.report import Report

from .data import TokenSequence
from .recipe import Recipe

FOLDER = "checkpoints"  # below the adapter's own
STATE = "run.json"
KEPT = 2

# Settings that leave the numbers of the start and of the training as they are.
_HARMLESS = {
    "out", "save_every", "resume", "metrics", "tasks", "num_fewshot", "visual", "evaluate", "limit",
    "allow_code_execution",
}  # fmt: skip
_PACKAGES = ("lora-one", "torch", "transformers", "peft", "jax", "flax", "optax", "mlx", "mlx-lm")


@dataclass
class Run:
    """A run as far as it has come, but for the arrays of its model and its optimizer.

    Attributes:
        settings: of its recipe, those that its numbers depend on.
        data: a digest of its training sequences.
        before: metrics of the test items before the training; None without any.
        validation: loss on held-out data before the training; None without any.
        report: of the initialisation; None for a plain start.
        losses: of the steps that are done.
        versions: of the packages that it began with.
    """

    settings: dict[str, Any]
    data: str
    before: dict[str, float] | None = None
    validation: float | None = None
    report: Report | None = None
    losses: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions(_PACKAGES))

    @classmethod
    def begin(cls, recipe: Recipe, sequences: Sequence[TokenSequence]) -> "Run":
        """A run of which nothing is done."""
        return cls(_settings(recipe), _digest_of(sequences))

    def check_settings(self, recipe: Recipe) -> None:
        """Raise ConfigError if the run began with settings that give other numbers."""
        changed = [
            f"{name} was {self.settings[name]!r}, is {value!r}"
            for name, value in _settings(recipe).items()
            if self.settings.get(name, value) != value
        ]
        if changed:
            raise ConfigError(
                f"resume needs the settings that the run in {recipe.out} began with, but {'; '.join(changed)}: give "
                "them as they were, or leave out resume to start from the beginning"
            )

    def check_data(self, sequences: Sequence[TokenSequence]) -> None:
        """Raise ConfigError if the run began with other training data."""
        if _digest_of(sequences) != self.data:
            raise ConfigError(
                f"resume needs the training data that the run began with, but the {len(sequences)} sequences of data "
                f"{self.settings['data']!r} are others now: bring back the file, or leave out resume to start from the "
                "beginning"
            )

    def changed_versions(self) -> list[str]:
        """Packages that are not those the run began with: its last digits may differ from here on."""
        now = installed_versions(_PACKAGES)
        return [
            f"{name} was {self.versions.get(name)}, is {now.get(name)}"
            for name in sorted(now.keys() | self.versions.keys())
            if now.get(name) != self.versions.get(name)
        ]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its step, the run so far, and the folder that its arrays are in."""

    step: int
    run: Run
    path: Path


class Checkpoints:
    """Where a run is saved while it is trained.

    Args:
        run: what is saved beside the arrays, as it is then.
        out: the adapter's folder.
        every: steps from one checkpoint to the next; None makes none.
        last: the step after which there is one anyway, so that a kill after the training costs no training.
        start: the checkpoint that the training goes on from; None for its beginning.
    """

    def __init__(self, run: Run, out: Path, every: int | None, last: int, start: Checkpoint | None = None):
        self.start = start
        self.every = every
        self._run = run
        self.folder = out / FOLDER
        self._last = last
        self._kept = [start.path] if start else []

    @property
    def done(self) -> int:
        """Steps that are done before the training goes on."""
        return self.start.step if self.start else 0

    def due(self, step: int) -> bool:
        """Whether there should be a checkpoint of a step."""
        return self.every is not None and (step % self.every == 0 or step == self._last) and step > self.done

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Make a checkpoint of the run after a step. At any moment the newest whole one is there.

        Args:
            fill: writes the model's and the optimizer's arrays into an empty folder.

        Raises:
            CheckpointError: it cannot be written. The checkpoints before it are as they were.
        """
        target = self.folder / f"step-{step}"
        with replacing(target) as new:
            try:
                fill(new)
            except RuntimeError as error:  # MLX's and torch's own where a disk is full
                raise OSError(str(error)) from error
            files = {file.name: _digest(file) for file in new.iterdir()}
            state = json.dumps({"files": files, "run": dataclasses.asdict(self._run)})
            (new / STATE).write_text(state, encoding="utf-8")
            # What an earlier run left must not be taken for a later step of this one.
            self._remove_all_but(self._kept[-(KEPT - 1) :])
        self._kept.append(target)

    def finish(self) -> None:
        """The run is done: only its last checkpoint stays, so that resuming it trains nothing again."""
        if self._kept:
            self._remove_all_but(self._kept[-1:])

    def _remove_all_but(self, kept: Sequence[Path]) -> None:
        for path in _newest_first(self.folder):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


NOWHERE = Checkpoints(Run({}, "", versions={}), Path(), every=None, last=0)


def latest(out: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of the run whose adapter goes to `out`; None without any.

    Args:
        warn: told of each checkpoint that is damaged, and passed over.
    """
    for path in _newest_first(out / FOLDER):
        try:
            run = _read(path)
            return Checkpoint(len(run.losses), run, path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            warn(f"{path} is damaged, and passed over: {error!r}")
    return None


def _read(path: Path) -> Run:
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    for name, digest in state["files"].items():
        if _digest(path / name) != digest:
            raise CheckpointError(f"{name} is not as it was written")
    values = state["run"]
    report = values["report"]
    run = Run(**{**values, "report": None if report is None else Report.from_dict(report)})
    if path.name != f"step-{len(run.losses)}":
        raise CheckpointError(f"its name does not fit its {len(run.losses)} losses")
    return run


def _newest_first(folder: Path) -> list[Path]:
    """The folders of checkpoints, whole or not."""
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def _settings(recipe: Recipe) -> dict[str, Any]:
    values = dataclasses.asdict(recipe)
    for name, value in values.pop("config").items():
        values[f"config.{name}" if name in values else name] = value
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return {name: value for name, value in plain.items() if name not in _HARMLESS}


def _digest_of(sequences: Sequence[TokenSequence]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(array("q", [len(sequence.tokens), sequence.prompt_length, *sequence.tokens]).tobytes())
    return digest.hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
