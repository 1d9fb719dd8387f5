"""Benchmarks of lm-evaluation-harness (`lm_eval`), run on a PyTorch model in memory."""

import contextlib
import functools
import io
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from lora_one.errors import BackendError, ConfigError, DataError
from lora_one.finetune.datasets import require
from lora_one.finetune.recipe import Recipe, Task
from lora_one.finetune.tuners.interface import Tuner

BATCH_SIZE = 8
FEWSHOT_SEED = 1234  # lm_eval's own

Loaded = dict[str, Any]  # lm_eval.tasks.TaskDict: "tasks", "groups", "group_map"


@functools.cache
def task_manager() -> Any:
    """Return the index of all tasks of lm_eval. It reads thousands of files, which takes half a minute, once."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    require("lm_eval")
    return require("lm_eval.tasks").TaskManager()


def open_tasks(recipe: Recipe) -> Loaded:
    """Load the recipe's tasks with their data.

    Raises:
        BackendError: lm_eval, or a package that a task needs, is not installed.
        ConfigError: there is no such task, or it runs the model's code and `allow_code_execution` is off.
        DataError: the data of a task cannot be read.
    """
    manager = task_manager()
    with tempfile.TemporaryDirectory() as folder:
        specs = [_spec(manager, task, recipe, Path(folder) / f"{i}.yaml") for i, task in enumerate(recipe.tasks)]
        try:
            loaded: Loaded = manager.load(specs)
        except ImportError as error:
            raise BackendError(f"a task of {_names(recipe)} needs a package that is not installed: {error}") from error
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"the tasks {_names(recipe)} cannot be loaded: {error}") from error
    with_own_number = {_name(task) for task in recipe.tasks if not isinstance(task, str) and "num_fewshot" in task}
    for name, task in loaded["tasks"].items():
        if name not in with_own_number and (recipe.num_fewshot is not None or task.get_config("num_fewshot") is None):
            task.set_config(key="num_fewshot", value=recipe.num_fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def run_tasks(tuner: Tuner, loaded: Loaded, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Run the tasks on the tuner's model. Return task -> metric -> value, and for a group only the group's values."""
    model = require("lm_eval.models.huggingface").HFLM(
        pretrained=tuner.model, tokenizer=tuner.tokenizer, batch_size=BATCH_SIZE
    )
    with contextlib.redirect_stderr(io.StringIO()):  # lm_eval's progress bars would break ours
        evaluation = require("lm_eval.evaluator").evaluate(
            model,
            loaded,
            limit=recipe.limit,
            bootstrap_iters=0,
            log_samples=False,
            confirm_run_unsafe_code=recipe.allow_code_execution,
        )
    members = {child for children in loaded["group_map"].values() for child in children}
    return {
        task: {_metric(name): float(value) for name, value in values.items() if _is_metric(name, value)}
        for task, values in {**evaluation["results"], **evaluation.get("groups", {})}.items()
        if task not in members
    }


def _name(task: Task) -> str:
    return task if isinstance(task, str) else str(task.get("task"))


def _names(recipe: Recipe) -> str:
    return ", ".join(map(_name, recipe.tasks))


def _spec(manager: Any, task: Task, recipe: Recipe, file: Path) -> str:
    """Return what lm_eval loads for a task of the recipe.

    A name stays as it is. For a mapping, `file` is written: it includes the task of that name and overrides its
    settings.
    """
    entry = manager.task_index.get(_name(task))
    if entry is None:
        raise ConfigError(f"tasks must be names that lm_eval {_version()} knows, got {_name(task)!r}")
    if (entry.cfg or {}).get("unsafe_code"):
        if not recipe.allow_code_execution:
            raise ConfigError(
                f"task {_name(task)!r} runs the code that the model writes: allow_code_execution (on the command line "
                "--allow-code-execution) lets it, in this process's rights; --no-evaluate leaves it out"
            )
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # required by the metric itself
    if isinstance(task, str):
        return task
    if entry.yaml_path is None or "group" in (entry.cfg or {}):
        raise ConfigError(f"settings can be given for single tasks only, got {_name(task)!r}")
    import yaml

    file.write_text(yaml.safe_dump({"include": str(entry.yaml_path), **task}), encoding="utf-8")
    return str(file)


def _version() -> str:
    return str(getattr(require("lm_eval"), "__version__", ""))


def _metric(name: str) -> str:
    return name.removesuffix(",none")


def _is_metric(name: str, value: object) -> bool:
    return "," in name and "_stderr" not in name and isinstance(value, (int, float))
