"""The whole job: data, model, LoRA-One's start, training, the adapter on disk. What `lora-one finetune` runs."""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from . import api
from .backends import load_backend, load_tuner
from .backends.interface import Tuner
from .data import Example, TokenSequence, encode, read_examples
from .initialization import InitWarning
from .recipe import Recipe
from .report import Report


class Progress(Protocol):
    """Who is told how far the job is."""

    def say(self, text: str) -> None:
        """A step of the job begins."""

    def warn(self, text: str) -> None:
        """Something went otherwise than asked, and a person should know."""

    def report(self, report: Report) -> None:
        """The initialisation is done."""

    def step(self, step: int, loss: float) -> None:
        """A training step is done."""

    def validation(self, when: str, loss: float) -> None:
        """The mean loss on held-out data, `when` is "before" or "after" the training."""

    def score(self, when: str, exact_match: float, count: int) -> None:
        """The test items were answered, `when` is "before" or "after"."""


@dataclass(frozen=True)
class Outcome:
    """What a fine-tuning run came to.

    Attributes:
        report: of the initialisation; None for a plain start.
        losses: the loss of each step's batch.
        before, after: exact match on the test items; None without a test file.
        out: the adapter's folder.
    """

    report: Report | None
    losses: list[float]
    before: float | None
    after: float | None
    out: Path


def finetune(recipe: Recipe, progress: Progress) -> Outcome:
    """Fine-tune as the recipe says, and save the adapter.

    Raises:
        LoraOneError: see `lora_one.errors`.
    """
    tuner, sequences, tests = _prepare(recipe, progress)
    questions = [encode(tuner.tokenizer, example) for example in tests]
    held_out = _held_out(recipe, tuner)
    before = _score(tuner, tests, questions, progress, "before")
    _validate(tuner, held_out, progress, "before")
    report = _start(tuner, sequences, recipe, progress)
    losses: list[float] = []

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        progress.step(step, loss)

    progress.say("Training")
    tuner.train(sequences, recipe, on_step)
    after = _score(tuner, tests, questions, progress, "after")
    _validate(tuner, held_out, progress, "after")
    out = Path(recipe.out)
    api.save(tuner.model, out, report)
    return Outcome(report, losses, before, after, out)


def initialize_only(recipe: Recipe, progress: Progress) -> Outcome:
    """The start alone, saved as an adapter, for people with a trainer of their own."""
    tuner, sequences, _ = _prepare(recipe, progress)
    report = _start(tuner, sequences, recipe, progress)
    out = Path(recipe.out)
    api.save(tuner.model, out, report)
    return Outcome(report, [], None, None, out)


def _prepare(recipe: Recipe, progress: Progress) -> tuple[Tuner, list[TokenSequence], list[Example]]:
    from . import demo

    # Bad data should not have to wait for a large model to load.
    examples = read_examples(recipe.data or demo.TRAIN)
    test = recipe.test or (demo.TEST if recipe.model is None else None)
    tests = read_examples(test) if test else []
    progress.say("Loading the model")
    tuner = load_tuner(recipe.backend).open_tuner(Path(recipe.model or demo.MODEL), recipe.dtype, recipe.device)
    return tuner, [encode(tuner.tokenizer, example) for example in examples], tests


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
        progress.warn(str(warning.message))
    progress.report(report)
    return report


def _score(
    tuner: Tuner, tests: list[Example], questions: list[TokenSequence], progress: Progress, when: str
) -> float | None:
    """The share of the test items, `questions` in tokens, that the model completes exactly, by greedy decoding."""
    if not tests:
        return None
    progress.say(f"Answering {len(tests)} test items")
    prompts = [question.tokens[: question.prompt_length] for question in questions]
    longest = max(len(question.tokens) - question.prompt_length for question in questions)
    answers = tuner.generate(prompts, max_new_tokens=longest + 1)
    texts = (tuner.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers)
    right = sum(text.strip() == example.completion.strip() for text, example in zip(texts, tests, strict=True))
    progress.score(when, right / len(tests), len(tests))
    return right / len(tests)


def _held_out(recipe: Recipe, tuner: Tuner) -> list[Any]:
    """Batches of the `valid.jsonl` beside the training data, where the data is a folder that has one."""
    file = Path(recipe.data or "") / "valid.jsonl"
    if recipe.data is None or not file.is_file():
        return []
    return tuner.batches([encode(tuner.tokenizer, example) for example in read_examples(file)], recipe.batch_size)


def _validate(tuner: Tuner, held_out: list[Any], progress: Progress, when: str) -> None:
    if held_out:
        progress.validation(when, tuner.mean_loss(held_out))
