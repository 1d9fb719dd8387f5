"""A training run: what is known of it besides the arrays of its model and its optimizer."""

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_one.environment import installed_versions
from lora_one.errors import ConfigError
from lora_one.report import Report

from .encoding import TokenSequence
from .recipe import Recipe

# Settings that change no number of the start or of the training, and so may change when a run is resumed.
_MAY_CHANGE = {
    "out", "save_every", "resume", "metrics", "tasks", "num_fewshot", "visual", "evaluate", "limit",
    "allow_code_execution", "report_to",
}  # fmt: skip
_PACKAGES = ("lora-one", "torch", "transformers", "peft", "jax", "flax", "optax", "mlx", "mlx-lm")


@dataclass
class Run:
    """The state of a run so far, except the arrays of its model and its optimizer.

    Attributes:
        settings: the settings of its recipe that its numbers depend on.
        data: a digest of its training sequences.
        before: the metrics of the test items before the training; None without test items.
        validation: the loss on held-out data before the training; None without such data.
        report: the report of the initialisation; None for a plain start.
        losses: the losses of the steps that are done.
        evaluations: (step, loss on held-out data) for each measurement during the training.
        versions: the versions of the packages that it began with.
    """

    settings: dict[str, Any]
    data: str
    before: dict[str, float] | None = None
    validation: float | None = None
    report: Report | None = None
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions(_PACKAGES))

    @classmethod
    def begin(cls, recipe: Recipe, sequences: Sequence[TokenSequence]) -> "Run":
        """Return a run of which no step is done."""
        return cls(_settings(recipe), _digest(sequences))

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
        if _digest(sequences) != self.data:
            raise ConfigError(
                f"resume needs the training data that the run began with, but the {len(sequences)} sequences of data "
                f"{self.settings['data']!r} are others now: bring back the file, or leave out resume to start from the "
                "beginning"
            )

    def changed_versions(self) -> list[str]:
        """Return the changes of packages since the run began. They can change the last digits of its numbers."""
        now = installed_versions(_PACKAGES)
        return [
            f"{name} was {self.versions.get(name)}, is {now.get(name)}"
            for name in sorted(now.keys() | self.versions.keys())
            if now.get(name) != self.versions.get(name)
        ]


def _settings(recipe: Recipe) -> dict[str, Any]:
    values = dataclasses.asdict(recipe)
    for name, value in values.pop("config").items():
        values[f"config.{name}" if name in values else name] = value
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return {name: value for name, value in plain.items() if name not in _MAY_CHANGE}


def _digest(sequences: Sequence[TokenSequence]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        sizes = [len(sequence.tokens), sequence.prompt_length, len(sequence.lengths)]
        digest.update(array("q", [*sizes, *sequence.lengths, *sequence.tokens, *sequence.mask]).tobytes())
    return digest.hexdigest()
