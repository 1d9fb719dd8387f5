"""The settings of `lora-one finetune`, from the command line or from a YAML or TOML file."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_one.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_positive,
    check_range,
    check_text,
    check_texts,
    shown,
)
from lora_one.config import Config
from lora_one.errors import ConfigError
from lora_one.files.settings import parsed, read_settings

from .datasets import Source, make_source

NOTES = "notes"  # a file's own remarks: where its values come from, what others reported
MAX_SEED = 2**32 - 1  # NumPy's, which transformers sets too
TORCH_ONLY = {"accumulation": 1, "schedule": "linear", "tasks": (), "visual": ()}  # setting -> what others have too


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to fine-tune, on what, and how.

    Attributes:
        model: folder of a model in Hugging Face's format, or its name on the hub; None is the embedded one. Causal
            language models; in PyTorch encoder-decoder and image-text ones too.
        data, test: JSON Lines files, or sources; None is the embedded task. Without `test` there is no exact match.
        backend: "torch", ...
        dtype: of the base weights: "float32", "bfloat16" or "float16".
        device: where the framework should put the model, for instance "cuda"; None is its default.
        steps, learning_rate, weight_decay: of the training.
        epochs: passes over the data, instead of `steps`.
        batch_size, accumulation: sequences of a micro-batch, and micro-batches of a step.
        schedule: "linear" or "cosine", down to zero after the warmup.
        warmup, warmup_ratio: steps, or the share of all steps, in which the learning rate rises.
        max_length: tokens that a training or validation sequence is cut to; of prompt and completion each in an
            encoder-decoder. A picture counts as one.
        precondition, reg, damping: see `lora_one.optimizer`.
        init_batches: micro-batches of the training data that the initialisation reads.
        plain: start LoRA as usual instead, for comparison.
        seed: of the order of the data and of the sketch.
        out: where the adapter goes, and `evaluation.json`.
        metrics: of the test items: "exact_match", "matthews".
        tasks: of lm-evaluation-harness, after the training: names, or mappings that override a task's own settings.
        num_fewshot: examples in the prompts of those `tasks` that do not say it themselves.
        visual: benchmarks of `lora_one.finetune.evaluation.visual`, after the training.
        evaluate: False leaves out `tasks` and `visual`.
        limit: at most so many items of each of them.
        allow_code_execution: lets tasks run the code that the model writes, in this process's rights.
        save_every: steps from one checkpoint of the training to the next, in `out/checkpoints`; None makes none.
        resume: go on from the newest checkpoint in `out`, where there is one.
        config: the initialisation.
    """

    model: str | None = None
    data: str | Source | None = None
    test: str | Source | None = None
    backend: str = "torch"
    dtype: str = "float32"
    device: str | None = None
    steps: int = 200
    epochs: float | None = None
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup: int = 10
    warmup_ratio: float | None = None
    max_length: int | None = None
    precondition: bool = False
    reg: float = 1e-6
    damping: str = "absolute"
    init_batches: int = 8
    plain: bool = False
    seed: int = 0
    out: str = "runs/adapter"
    metrics: tuple[str, ...] = ("exact_match",)
    tasks: tuple[str | Mapping[str, Any], ...] = ()
    num_fewshot: int | None = None
    visual: tuple[str, ...] = ()
    evaluate: bool = True
    limit: int | None = None
    allow_code_execution: bool = False
    save_every: int | None = None
    resume: bool = False
    config: Config = field(default_factory=Config)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _tasks(self.tasks))
        for name in ("metrics", "visual"):
            object.__setattr__(self, name, check_texts(name, getattr(self, name)))
        for name in ("data", "test"):
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, make_source(getattr(self, name), name))
        self._check_texts()
        self._check_numbers()
        unknown = sorted(set(self.metrics) - {"exact_match", "matthews"})
        if unknown or not self.metrics:
            raise ConfigError(f"metrics must be exact_match or matthews, got {', '.join(unknown) or 'none'}")
        if (self.model is None) != (self.data is None):
            given, missing = ("model", "data") if self.data is None else ("data", "model")
            raise ConfigError(f"{given} is given without {missing}: give both, or neither for the embedded ones")
        for name, usual in TORCH_ONLY.items():
            if self.backend != "torch" and getattr(self, name) != usual:
                raise ConfigError(f"{name} needs the backend torch so far, got {self.backend!r}: leave it out")

    def _check_texts(self) -> None:
        for name in ("backend", "out"):
            check_text(name, getattr(self, name))
        for name in ("model", "data", "test", "device"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Source):
                check_text(name, value)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check_choice("schedule", self.schedule, ("linear", "cosine"))
        check_choice("damping", self.damping, ("absolute", "relative"))
        for name in ("precondition", "plain", "evaluate", "allow_code_execution", "resume"):
            check_flag(name, getattr(self, name))

    def _check_numbers(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "init_batches"):
            check_integer(name, getattr(self, name), least=1)
        check_integer("warmup", self.warmup, least=0)
        check_integer("seed", self.seed, least=0, most=MAX_SEED)
        check_positive("learning_rate", self.learning_rate)
        check_range("weight_decay", self.weight_decay, 0.0)
        check_range("reg", self.reg, 0.0)
        for name in ("max_length", "limit", "save_every"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)
        if self.num_fewshot is not None:
            check_integer("num_fewshot", self.num_fewshot, least=0)
        if self.epochs is not None:
            check_positive("epochs", self.epochs)
        if self.warmup_ratio is not None:
            check_range("warmup_ratio", self.warmup_ratio, 0.0, 1.0)

    def for_examples(self, count: int) -> "Recipe":
        """This recipe with `steps` and `warmup` as numbers, for `count` training sequences."""
        steps, warmup = self.steps, self.warmup
        if self.epochs is not None:
            steps = math.ceil(self.epochs * math.ceil(math.ceil(count / self.batch_size) / self.accumulation))
        if self.warmup_ratio is not None:
            warmup = math.ceil(self.warmup_ratio * steps)
        return dataclasses.replace(self, steps=steps, epochs=None, warmup=warmup, warmup_ratio=None)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings in a file, flat: names of `Recipe` and of `Config` beside each other; `notes` is passed over.

    Args:
        path: .toml, .yaml or .yml.

    Raises:
        ConfigError: a file that cannot be read, or a setting that does not exist. Values are checked by `make_recipe`.
    """
    values = read_settings(Path(path))
    values.pop(NOTES, None)
    known = _names(Recipe) | _names(Config)
    unknown = sorted(map(str, set(values) - known))
    if unknown:
        raise ConfigError(f"{path}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return values


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A `Recipe` from flat settings; `seed` goes to both the data and the sketch.

    Raises:
        ConfigError: a value that cannot be, with the setting's name.
    """
    recipe = {name: value for name, value in values.items() if name in _names(Recipe)}
    config = {name: value for name, value in values.items() if name in _names(Config)}
    return Recipe(**parsed(Recipe, recipe), config=Config(**parsed(Config, config)))


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} - {"config"}


def _tasks(tasks: Any) -> tuple[str | Mapping[str, Any], ...]:
    if isinstance(tasks, (str, Mapping)) or not hasattr(tasks, "__iter__"):
        raise ConfigError(f"tasks must be a list, got {shown(tasks)}")
    found = tuple(tasks)
    for task in found:
        if not isinstance(task.get("task") if isinstance(task, Mapping) else task, str):
            raise ConfigError(f'tasks must be names, or settings with the name as "task", got {shown(task)}')
    return found
