"""The stand-in for the hub, and lm_eval's own task files for the tasks that the recipes name."""

import shutil
from pathlib import Path

import datasets
import evaluate
import lm_eval.tasks
import pytest

from lora_one.finetune.evaluation import lm_eval as harness
from tests.finetune.recipes.hub import MMLU, make_hub

TASKS = Path(lm_eval.tasks.__file__).parent
FOLDERS = ["gsm8k", "hendrycks_math", "humaneval", "super_glue/boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc"]


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        patch.setattr(evaluate.config, "HF_EVALUATE_CACHE", str(cache / "evaluate"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(cache / "metrics"))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache / "modules"))
        make_hub(root)
        yield root


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """lm_eval's files of these tasks and no others: reading all of its 14,000 takes half a minute."""
    mmlu = tmp_path_factory.mktemp("mmlu")
    for file in [*(TASKS / "mmlu/default").glob("_*"), *(TASKS / f"mmlu/default/mmlu_{name}.yaml" for name in MMLU)]:
        shutil.copy(file, mmlu)
    folders = [TASKS / name for name in [*FOLDERS, "openbookqa"]]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*folders, mmlu])


@pytest.fixture
def in_hub(hub, tasks, monkeypatch):
    """The working directory is the hub. A random model hardly ever ends: its answers are cut at 16 tokens."""
    opened = harness.open_tasks

    def open_tasks(recipe):
        loaded = opened(recipe)
        for task in loaded["tasks"].values():
            if task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value={"max_gen_toks": 16}, update=True)
        return loaded

    monkeypatch.setattr(harness, "open_tasks", open_tasks)
    monkeypatch.setattr(harness, "task_manager", lambda: tasks)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    monkeypatch.chdir(hub)
    return hub
