"""The benchmarks that a recipe names, after its training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lora_one.files.atomic import write_whole
from lora_one.finetune.data import Example, TokenSequence
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.tuners.interface import Tuner

SCORES = "evaluation.json"

Scores = dict[str, dict[str, float]]  # benchmark -> metric -> value


class Listener(Protocol):
    """Who is told of a benchmark's value: part of `lora_one.finetune.job.Progress`."""

    def say(self, text: str) -> None: ...

    def benchmark(self, task: str, metric: str, value: float) -> None: ...


class Evaluation:
    """A recipe's benchmarks, their data read and their settings checked.

    Raises:
        BackendError: a package that they need is not installed.
        ConfigError: no such benchmark, or one that runs code where that is not allowed.
        DataError: a benchmark's data cannot be read.
    """

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._tasks: Any = None
        self._visual: list[Any] = []
        if recipe.evaluate and recipe.tasks:
            from .lm_eval import open_tasks

            self._tasks = open_tasks(recipe)
        if recipe.evaluate and recipe.visual:
            from .visual import open_benchmark

            self._visual = [open_benchmark(name, recipe.limit) for name in recipe.visual]

    def run(self, tuner: Tuner, progress: Listener) -> Scores:
        """Run them all on the tuner's model as it is now."""
        scores: Scores = {}
        if self._tasks is not None:
            from .lm_eval import run_tasks

            progress.say("Running lm-evaluation-harness")
            scores |= run_tasks(tuner, self._tasks, self._recipe)
        for benchmark in self._visual:
            progress.say(f"Answering {benchmark.name}")
            given = answers(tuner, benchmark.encode(tuner.tokenizer), benchmark.max_new_tokens)
            scores[benchmark.name] = benchmark.score(given)
            benchmark.write_log(Path(self._recipe.out), given, self._recipe.model)
        for task, metrics in scores.items():
            for metric, value in metrics.items():
                progress.benchmark(task, metric, value)
        return scores


def answers(tuner: Tuner, questions: Sequence[TokenSequence], max_new_tokens: int) -> list[str]:
    """What the model says after each prompt, by greedy decoding."""
    prompts = [question.tokens[: question.prompt_length] for question in questions]
    pictures = [question.pictures for question in questions]
    seeing: dict[str, Any] = {"pictures": pictures} if any(pictures) else {}
    found = tuner.generate(prompts, max_new_tokens=max_new_tokens, **seeing)
    return [tuner.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]


def reference(tuner: Tuner, example: Example, question: TokenSequence) -> str:
    """The text that is right: tool calls as the chat template writes them."""
    if example.answer is None:
        return example.completion
    text: str = tuner.tokenizer.decode(question.tokens[question.prompt_length :], skip_special_tokens=True)
    return text


def write_scores(folder: Path, scores: Scores) -> None:
    """Keep a run's values beside its adapter."""
    write_whole(folder / SCORES, json.dumps(scores, indent=1) + "\n")
