"""The benchmarks that a recipe names, run after its training."""

import json
from pathlib import Path
from typing import Any

from lora_one.files.atomic import write_whole
from lora_one.finetune.progress import Progress
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.tuners.interface import Tuner

from .answering import answers

SCORES = "evaluation.json"

Scores = dict[str, dict[str, float]]  # benchmark -> metric -> value


class Benchmarks:
    """A recipe's benchmarks, with their data loaded and their settings checked.

    Raises:
        BackendError: a package that they need is not installed.
        ConfigError: there is no such benchmark, or it runs code and the recipe does not allow that.
        DataError: the data of a benchmark cannot be read.
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

    def run(self, tuner: Tuner, progress: Progress) -> Scores:
        """Run all benchmarks on the tuner's model as it is now, and return their scores."""
        scores: Scores = {}
        if self._tasks is not None:
            from .lm_eval import run_tasks

            progress.say("Running lm-evaluation-harness")
            scores |= run_tasks(tuner, self._tasks, self._recipe)
        for benchmark in self._visual:
            progress.say(f"Answering {benchmark.name}")
            given = answers(tuner, benchmark.encode(tuner.tokenizer), benchmark.max_new_tokens, progress)
            scores[benchmark.name] = benchmark.score(given)
            benchmark.write_log(Path(self._recipe.out), given, self._recipe.model)
        for task, metrics in scores.items():
            for metric, value in metrics.items():
                progress.benchmark(task, metric, value)
        return scores


def write_scores(folder: Path, scores: Scores) -> None:
    """Write the scores of a run beside its adapter."""
    write_whole(folder / SCORES, json.dumps(scores, indent=1) + "\n")
