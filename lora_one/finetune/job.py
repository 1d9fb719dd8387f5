"""The whole job: data, model, LoRA-One's start, training, the adapter on disk. What `lora-one finetune` runs."""

import itertools
import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lora_one import api
from lora_one.backends import load_backend
from lora_one.errors import DataError, InitWarning
from lora_one.report import Report

from .data import Example, TokenSequence, encode, read_examples
from .datasets import Rows, Source
from .destination import check_writable
from .evaluation.benchmarks import Evaluation, answers, reference, write_scores
from .evaluation.scores import METRICS
from .fit import check_questions, check_sequences
from .recipe import Recipe
from .runs import FOLDER, Checkpoint, Checkpoints, Run, latest
from .tuners.interface import Tuner
from .tuners.loading import load_tuner


class Progress(Protocol):
    """Who is told how far the job is."""

    def say(self, text: str) -> None:
        """A step of the job begins."""

    def warn(self, text: str) -> None:
        """Something went otherwise than asked, and a person should know."""

    def report(self, report: Report) -> None:
        """The initialisation is done."""

    def training(self, steps: int) -> None:
        """The training begins."""

    def step(self, step: int, loss: float) -> None:
        """A training step is done."""

    def validation(self, when: str, loss: float) -> None:
        """The mean loss on held-out data, `when` is "before" or "after" the training."""

    def score(self, when: str, exact_match: float, count: int) -> None:
        """The test items were answered, `when` is "before" or "after"."""

    def benchmark(self, task: str, metric: str, value: float) -> None:
        """A benchmark was run, after the training."""


@dataclass(frozen=True)
class Outcome:
    """What a fine-tuning run came to.

    Attributes:
        report: of the initialisation; None for a plain start.
        losses: the loss of each step's batch.
        before, after: exact match on the test items; None without any.
        scores: benchmark -> metric -> value after the training, as in `evaluation.json`; "test" is the test items'.
        out: the adapter's folder.
        resumed: steps that came from a checkpoint.
    """

    report: Report | None
    losses: list[float]
    before: float | None
    after: float | None
    out: Path
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    resumed: int = 0


def finetune(recipe: Recipe, progress: Progress) -> Outcome:
    """Fine-tune as the recipe says, and save the adapter.

    Raises:
        LoraOneError: see `lora_one.errors`.
    """
    check_writable(Path(recipe.out))
    evaluation = Evaluation(recipe)  # what it lacks should not be found out after the training
    found = _checkpoint(recipe, progress)
    tuner, sequences, tests = _prepare(recipe, progress)
    run = found.run if found else Run.begin(recipe, sequences)
    recipe = recipe.for_examples(len(sequences))
    questions = _questions(tuner, tests, recipe)
    held_out = _held_out(recipe, tuner)
    if found:
        run.check_data(sequences)
        _attach(tuner, recipe)
        _retell(run, len(tests), progress)
    else:
        run.before = _score(tuner, tests, questions, recipe, progress, "before")
        run.validation = _validate(tuner, held_out, progress, "before")
        run.report = _start(tuner, sequences, recipe, progress)

    def on_step(step: int, loss: float) -> None:
        run.losses.append(loss)
        progress.step(step, loss)

    checkpoints = Checkpoints(run, Path(recipe.out), recipe.save_every, recipe.steps, found)
    progress.training(recipe.steps)
    for step, loss in enumerate(run.losses, start=1):
        progress.step(step, loss)
    tuner.train(sequences, recipe, on_step, checkpoints)
    after = _score(tuner, tests, questions, recipe, progress, "after")
    _validate(tuner, held_out, progress, "after")
    out = Path(recipe.out)
    api.save(tuner.model, out, run.report)
    checkpoints.finish()
    scores = {"test": after} if after else {}
    scores |= evaluation.run(tuner, progress)
    if scores:
        write_scores(out, scores)
    exact = [None if values is None else values["exact_match"] for values in (run.before, after)]
    return Outcome(run.report, run.losses, exact[0], exact[1], out, scores, checkpoints.done)


def initialize_only(recipe: Recipe, progress: Progress) -> Outcome:
    """The start alone, saved as an adapter, for people with a trainer of their own."""
    check_writable(Path(recipe.out))
    tuner, sequences, _ = _prepare(recipe, progress)
    report = _start(tuner, sequences, recipe, progress)
    out = Path(recipe.out)
    api.save(tuner.model, out, report)
    return Outcome(report, [], None, None, out)


def _checkpoint(recipe: Recipe, progress: Progress) -> Checkpoint | None:
    """What to go on from. A script can always ask to resume: the first time there is nothing yet."""
    out = Path(recipe.out)
    if not recipe.resume:
        if any((out / FOLDER).glob("step-*")):
            progress.warn(f"{out / FOLDER} has checkpoints of an earlier run: without resume they are not used")
        return None
    found = latest(out, progress.warn)
    if found is None:
        progress.warn(f"nothing to resume: {out / FOLDER} has no checkpoint; starting from the beginning")
        return None
    found.run.check_settings(recipe)
    for change in found.run.changed_versions():
        progress.warn(f"{change}: from here on the last digits may be others than those of a run without a break")
    return found


def _attach(tuner: Tuner, recipe: Recipe) -> None:
    """LoRA on the layers that the run has it on; the factors come from its checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InitWarning)  # the run has told them when it began
        tuner.model = load_backend(recipe.backend).attach_plain(tuner.model, recipe.config)


def _retell(run: Run, tests: int, progress: Progress) -> None:
    """What was found out before the training."""
    progress.say("Going on from a checkpoint")
    if run.before is not None:
        progress.score("before", run.before["exact_match"], tests)
    if run.validation is not None:
        progress.validation("before", run.validation)
    if run.report is not None:
        progress.report(run.report)


def _prepare(recipe: Recipe, progress: Progress) -> tuple[Tuner, list[TokenSequence], list[Example]]:
    from lora_one import demo

    # Bad data should not have to wait for a large model to load.
    examples = _open(recipe.data or demo.TRAIN)
    test = recipe.test or (demo.TEST if recipe.model is None else None)
    tests = list(_open(test)) if test else []
    progress.say("Loading the model")
    tuner = load_tuner(recipe.backend).open_tuner(Path(recipe.model or demo.MODEL), recipe.dtype, recipe.device)
    return tuner, _encode_all(tuner, examples, recipe, progress), tests


def _open(data: str | Path | Source) -> Iterable[Example]:
    return Rows(data) if isinstance(data, Source) else read_examples(data)


def _encode_all(tuner: Tuner, examples: Iterable[Example], recipe: Recipe, progress: Progress) -> list[TokenSequence]:
    source = recipe.data if isinstance(recipe.data, Source) else None
    encoded = (encode(tuner.tokenizer, example) for example in examples)
    if source is not None and source.max_tokens is not None:
        encoded = (sequence for sequence in encoded if len(sequence.tokens) < source.max_tokens)
    limit = None if source is None else source.max_examples
    whole = list(itertools.islice(encoded, limit))
    if recipe.max_length is None:
        sequences = whole
    else:
        cut = (sequence.cut(recipe.max_length, tuner.separate) for sequence in whole)
        sequences = [sequence for sequence in cut if sequence is not None]
    if not sequences:
        raise DataError("the training data must hold at least one example, got none: look at its filters and lengths")
    if len(sequences) < len(whole):
        lost = len(whole) - len(sequences)
        progress.warn(f"{lost} of {len(whole)} examples have a prompt that fills max_length: they are left out")
    remark = check_sequences(sequences, tuner.tokenizer, tuner.limits, tuner.separate)
    if remark is not None:
        progress.warn(remark)
    return sequences


def _questions(tuner: Tuner, tests: list[Example], recipe: Recipe) -> list[TokenSequence]:
    questions = [encode(tuner.tokenizer, example) for example in tests]
    if tuner.separate and recipe.max_length is not None:
        questions = [question.cut(recipe.max_length, separate=True) or question for question in questions]
    check_questions(questions, tuner.tokenizer, tuner.limits, tuner.separate)
    return questions


def _start(tuner: Tuner, sequences: list[TokenSequence], recipe: Recipe, progress: Progress) -> Report | None:
    if recipe.plain:
        progress.say("Plain LoRA start")
        tuner.model = load_backend(recipe.backend).attach_plain(tuner.model, recipe.config)
        return None
    progress.say("LoRA-One: reading the gradient")
    count = min(len(sequences), recipe.init_batches * recipe.batch_size)
    sample = random.Random(recipe.seed).sample(sequences, count)
    batches = tuner.batches(sample, recipe.batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InitWarning)
        tuner.model, report = api.init(tuner.model, batches, tuner.loss_fn, recipe.config, recipe.backend)
    for warning in caught:
        if issubclass(warning.category, InitWarning):
            progress.warn(str(warning.message))
        else:  # another library's
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    progress.report(report)
    return report


def _score(
    tuner: Tuner, tests: list[Example], questions: list[TokenSequence], recipe: Recipe, progress: Progress, when: str
) -> dict[str, float] | None:
    """The metrics of the completions of the test items, `questions` in tokens; exact match is always one of them."""
    if not tests:
        return None
    progress.say(f"Answering {len(tests)} test items")
    longest = max(len(question.tokens) - question.prompt_length for question in questions)
    given = answers(tuner, questions, max_new_tokens=longest + 1)
    right = [reference(tuner, *item) for item in zip(tests, questions, strict=True)]
    pairs = [(text.strip(), wanted.strip()) for text, wanted in zip(given, right, strict=True)]
    found = {metric: METRICS[metric](pairs) for metric in ("exact_match", *recipe.metrics)}
    progress.score(when, found["exact_match"], len(tests))
    return found


def _held_out(recipe: Recipe, tuner: Tuner) -> list[Any]:
    """Batches of the `valid.jsonl` beside the training data, where the data is a folder that has one."""
    if not isinstance(recipe.data, str) or not (file := Path(recipe.data) / "valid.jsonl").is_file():
        return []
    whole = [encode(tuner.tokenizer, example) for example in read_examples(file)]
    length = recipe.max_length
    cut = whole if length is None else [sequence.cut(length, tuner.separate) for sequence in whole]
    sequences = [sequence for sequence in cut if sequence is not None]
    check_sequences(sequences, tuner.tokenizer, tuner.limits, tuner.separate)
    return tuner.batches(sequences, recipe.batch_size)


def _validate(tuner: Tuner, held_out: list[Any], progress: Progress, when: str) -> float | None:
    if not held_out:
        return None
    loss = tuner.mean_loss(held_out)
    progress.validation(when, loss)
    return loss
