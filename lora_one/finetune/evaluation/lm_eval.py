"""Benchmarks of lm-evaluation-harness (`lm_eval`), run on a PyTorch model as it is in memory."""

import contextlib
import functools
import io
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_one.errors import BackendError, ConfigError, DataError
from lora_one.finetune.datasets import require
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.tuners.interface import Tuner

EVALUATED_AT_ONCE = 8
FEWSHOT_SEED = 1234  # lm_eval's own

Loaded = dict[str, Any]  # lm_eval.tasks.TaskDict: "tasks", "groups", "group_map"


@functools.cache
def task_manager() -> Any:
    """All tasks that lm_eval knows. It reads thousands of files: half a minute, once."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    require("lm_eval")
    return require("lm_eval.tasks").TaskManager()


def open_tasks(recipe: Recipe) -> Loaded:
    """The recipe's tasks with their data.

    Raises:
        BackendError: lm_eval, or a package that a task needs, is not installed.
        ConfigError: no such task, or one that runs the model's code while `allow_code_execution` is off.
        DataError: a task's data cannot be read.
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
    own = {_name(task) for task in recipe.tasks if not isinstance(task, str) and "num_fewshot" in task}
    for name, task in loaded["tasks"].items():
        if name not in own and (recipe.num_fewshot is not None or task.get_config("num_fewshot") is None):
            task.set_config(key="num_fewshot", value=recipe.num_fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def run_tasks(tuner: Tuner, loaded: Loaded, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Run them on the tuner's model. Returns task -> metric -> value; of a group only the group's own."""
    model = require("lm_eval.models.huggingface").HFLM(
        pretrained=tuner.model, tokenizer=tuner.tokenizer, batch_size=EVALUATED_AT_ONCE
    )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars would tear ours
        found = require("lm_eval.evaluator").evaluate(
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
        for task, values in {**found["results"], **found.get("groups", {})}.items()
        if task not in members
    }


def _name(task: str | Mapping[str, Any]) -> str:
    return task if isinstance(task, str) else str(task.get("task"))


def _names(recipe: Recipe) -> str:
    return ", ".join(map(_name, recipe.tasks))


def _spec(manager: Any, task: str | Mapping[str, Any], recipe: Recipe, file: Path) -> str:
    """A name as it is; a mapping as a file that includes the task it is named after, with its own settings over it."""
    entry = manager.task_index.get(_name(task))
    if entry is None:
        raise ConfigError(f"tasks must be names that lm_eval {_version()} knows, got {_name(task)!r}")
    if (entry.cfg or {}).get("unsafe_code"):
        if not recipe.allow_code_execution:
            raise ConfigError(
                f"task {_name(task)!r} runs the code that the model writes: allow_code_execution (on the command line "
                "--allow-code-execution) lets it, in this process's rights; --no-evaluate leaves it out"
            )
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric itself asks for
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


def _is_metric(name: str, value: Any) -> bool:
    return "," in name and "_stderr" not in name and isinstance(value, (int, float))
