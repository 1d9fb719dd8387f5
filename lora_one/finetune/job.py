"""The whole job that `lora-one finetune` runs: data, model, LoRA-One's start, training, the adapter on disk."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_one import api
from lora_one.report import Report

from .checkpoints import Checkpoints, checkpoint_to_resume
from .destination import check_writable
from .encoding import TokenSequence
from .evaluation.benchmarks import Benchmarks, write_scores
from .evaluation.held_out import open_held_out
from .metrics import MetricsFile
from .preparation import prepare
from .progress import Progress
from .recipe import Recipe
from .runs import Run
from .start import attach_again, start
from .tuners.interface import AfterStep, Tuner
from .validation import Validation


@dataclass(frozen=True)
class Outcome:
    """The result of a fine-tuning job, as `finetune` and `initialize_only` return it.

    Use it in a script to compare runs without reading their files: the losses step by step, the exact match before and
    after, and the scores of all benchmarks.

    Attributes:
        report: the report of the initialisation; None for a plain start.
        losses: the loss of each step's batch, in the order of the steps.
        before: the exact match on the test items before the training; None without test items.
        after: the exact match on the test items after the training; None without test items.
        out: the adapter's folder.
        scores: benchmark -> metric -> value after the training, as in `evaluation.json`; "test" stands for the test
            items.
        resumed: the number of steps that came from a checkpoint.

    >>> from pathlib import Path
    >>> from lora_one.finetune import Outcome
    >>> outcome = Outcome(None, losses=[2.0, 1.5], before=0.1, after=0.8, out=Path("runs/adapter"))
    >>> outcome.after > outcome.before, outcome.losses[-1]
    (True, 1.5)
    """

    report: Report | None
    losses: list[float]
    before: float | None
    after: float | None
    out: Path
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    resumed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "out": str(self.out), "report": None if self.report is None else self.report.to_dict()}


def finetune(recipe: Recipe, progress: Progress) -> Outcome:
    """Fine-tune a model as the recipe says, and save the adapter.

    This is `lora-one finetune` without its terminal, for a script that runs many jobs. It loads the data and the model,
    starts LoRA, trains, answers the test items and runs the benchmarks. It writes checkpoints, and continues from one,
    if the recipe says so. Everything that can be checked is checked before the training.

    Args:
        recipe: all settings; `lora_one.finetune.recipe.make_recipe` makes one from a dict.
        progress: a listener that is told how far the job is.

    Returns:
        The losses, the scores, and the adapter's folder.

    Raises:
        LoraOneError: the data, the model, a setting or the disk does not allow it; see `lora_one.errors`.

    >>> from unittest.mock import Mock
    >>> from lora_one import demo
    >>> from lora_one.finetune import finetune
    >>> from lora_one.finetune.recipe import make_recipe
    >>> settings = {"model": str(demo.MODEL), "data": str(demo.TRAIN), "out": "adapter", "device": "cpu"}
    >>> recipe = make_recipe({**settings, "rank": 2, "passes": 2, "init_batches": 1, "batch_size": 4, "steps": 2})
    >>> outcome = finetune(recipe, progress=Mock())  # a listener that does nothing
    >>> len(outcome.losses), (outcome.out / "adapter_model.safetensors").exists()
    (2, True)
    """
    out = Path(recipe.out)
    check_writable(out)
    benchmarks = Benchmarks(recipe)  # before the training, since it checks packages, settings and data
    checkpoint = checkpoint_to_resume(recipe, progress.warn)
    prepared = prepare(recipe, progress)
    tuner, sequences = prepared.tuner, prepared.sequences
    run = checkpoint.run if checkpoint else Run.begin(recipe, sequences)
    recipe = recipe.for_examples(len(sequences))
    held_out = open_held_out(recipe, tuner, prepared.tests, prepared.held_out)
    if checkpoint:
        run.check_data(sequences)
        attach_again(tuner, recipe, run.report)
        _report_again(run, len(prepared.tests), progress)
    else:
        run.before = held_out.score(tuner, progress, "before")
        run.validation = held_out.validate(tuner, progress, "before")
        run.report = start(tuner, sequences, recipe, progress)
    validation = Validation(recipe, run, tuner, held_out.batches, progress, checkpoint.path if checkpoint else None)
    checkpoints = Checkpoints(run, out, recipe.save_every, recipe.steps, checkpoint, validation.save)
    _train(run, tuner, sequences, recipe, progress, checkpoints, validation)
    validation.finish()
    after = held_out.score(tuner, progress, "after")
    held_out.validate(tuner, progress, "after")
    api.save(tuner.model, out, run.report)
    checkpoints.finish()
    scores = {"test": after} if after else {}
    scores |= benchmarks.run(tuner, progress)
    if scores:
        write_scores(out, scores)
    return Outcome(run.report, run.losses, _exact(run.before), _exact(after), out, scores, checkpoints.done)


def initialize_only(recipe: Recipe, progress: Progress) -> Outcome:
    """Start LoRA and save the adapter without training it, for people who train with their own code.

    This is `lora-one init` without its terminal. Open the saved folder with PEFT, mlx-lm or `lora_one.load`, and train
    it with any trainer.

    Args:
        recipe: the settings; those of the training are not used.
        progress: a listener that is told how far the job is.

    Returns:
        The report of the initialisation and the adapter's folder; there are no losses and no scores.

    Raises:
        LoraOneError: the data, the model, a setting or the disk does not allow it; see `lora_one.errors`.

    >>> from unittest.mock import Mock
    >>> from lora_one import demo
    >>> from lora_one.finetune import initialize_only
    >>> from lora_one.finetune.recipe import make_recipe
    >>> settings = {"model": str(demo.MODEL), "data": str(demo.TRAIN), "out": "adapter", "device": "cpu"}
    >>> recipe = make_recipe({**settings, "rank": 2, "passes": 2, "init_batches": 1, "batch_size": 4})
    >>> outcome = initialize_only(recipe, progress=Mock())  # a listener that does nothing
    >>> outcome.losses, len(outcome.report.layers) > 0
    ([], True)
    """
    out = Path(recipe.out)
    check_writable(out)
    prepared = prepare(recipe, progress)
    report = start(prepared.tuner, prepared.sequences, recipe, progress)
    api.save(prepared.tuner.model, out, report)
    return Outcome(report, [], None, None, out)


def _report_again(run: Run, tests: int, progress: Progress) -> None:
    """Report what was measured when the resumed run began."""
    progress.say("Going on from a checkpoint")
    if run.before is not None:
        progress.score("before", run.before["exact_match"], tests)
    if run.validation is not None:
        progress.validation("before", run.validation)
    if run.report is not None:
        progress.report(run.report)
    for step, loss in run.evaluations:
        progress.validation(f"at step {step}", loss)


def _train(
    run: Run,
    tuner: Tuner,
    sequences: list[TokenSequence],
    recipe: Recipe,
    progress: Progress,
    checkpoints: Checkpoints,
    validation: Validation,
) -> None:
    if validation.stopped:  # a resumed run that has stopped early: nothing is left to train
        recipe = dataclasses.replace(recipe, steps=checkpoints.done)
    metrics = MetricsFile(Path(recipe.out), run)

    def on_step(step: int, loss: float) -> AfterStep:
        run.losses.append(loss)
        progress.step(step, loss)
        metrics.write(step, loss=loss)
        after = validation.after_step(step)
        if after.loss is not None:
            metrics.write(step, eval_loss=after.loss)
        if after.stop:
            progress.say(f"Stopping after step {step}: the loss on held-out data has not become smaller")
        return after

    progress.training(recipe.steps)
    for step, loss in enumerate(run.losses, start=1):  # of a resumed run
        progress.step(step, loss)
    tuner.train(sequences, recipe, on_step, checkpoints)


def _exact(metrics: dict[str, float] | None) -> float | None:
    return None if metrics is None else metrics["exact_match"]
