"""The settings of `lora-one finetune`, from the command line or from a YAML or TOML file."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

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
from lora_one.core.precondition import Damping
from lora_one.errors import ConfigError
from lora_one.files.settings import parsed, read_settings

from .evaluation.scores import METRICS
from .source import Source, make_source
from .template import LossOn

NOTES = "notes"  # a section of a file for remarks: where its values come from, what others reported
MAX_SEED = 2**32 - 1  # NumPy's limit; transformers seeds NumPy too
TORCH_ONLY = {"tasks": (), "visual": (), "report_to": ()}  # setting -> value elsewhere


Task = str | Mapping[str, Any]  # the name of a task of lm_eval, or its settings, with the name as "task"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a fine-tuning run: the model, the data, the training and what is measured.

    Attributes:
        model: a folder with a model in Hugging Face's format, or its name on the hub; None is the embedded model. On
            every backend a causal language model; in PyTorch also an encoder-decoder or an image-text model.
        data: the training data: a JSON Lines file, a folder with one, or a source; None is the embedded task.
        test: the test items, in the same forms. Without them exact match is not measured.
        valid: held-out data for a loss before and after the training, and during it with `eval_every`; None is the
            valid.jsonl beside the training data, if there is one.
        valid_share: the share of the training data to hold out instead, drawn by the seed.
        loss_on: the tokens that are learnt: "answers" (all messages of the assistant, or the completion), "last_answer"
            or "everything".
        chat_template: put prompt and completion through the tokenizer's chat template, if it has one. Conversations
            always go through it.
        packing: put several examples into one row of `max_length` tokens; they do not see each other.
        backend: the framework: "torch", "jax" or "mlx".
        dtype: the dtype of the base weights: "float32", "bfloat16" or "float16".
        device: where the framework should put the model, for instance "cuda"; None is the framework's default.
        steps: the number of training steps.
        epochs: the number of passes over the data, instead of `steps`.
        batch_size: the number of sequences, or of packed rows, in a micro-batch.
        accumulation: the number of micro-batches in a step, whose loss is the mean over all their tokens.
        learning_rate: the largest learning rate.
        weight_decay: AdamW's weight decay.
        max_grad_norm: the norm that a step's gradient is clipped to; 0 clips nothing.
        gradient_checkpointing: compute the activations again in the backward pass, to save memory.
        schedule: "linear" or "cosine": how the learning rate falls to zero after the warm-up; "constant": it does not.
        warmup: the number of steps in which the learning rate rises.
        warmup_ratio: the share of all steps in which it rises, instead of `warmup`.
        max_length: the number of tokens that a training or validation sequence is cut to. In an encoder-decoder, prompt
            and completion are cut separately. A picture counts as one token.
        eval_every: the number of training steps between two measurements of the loss on the held-out data.
        keep_best: keep the adapter of the step with the least loss on the held-out data, instead of the last one.
        early_stopping: the number of measurements without a smaller loss after which the training stops.
        report_to: trackers of transformers' Trainer, such as "tensorboard", "wandb" or "trackio". On every backend, the
            losses are in metrics.jsonl in `out`.
        precondition: add the paper's r x r preconditioner to AdamW; see `lora_one.optimizer`.
        reg: what the preconditioner adds to the diagonal of its r x r matrices.
        damping: "absolute" or "relative": whether `reg` is added as it is, or times the mean of the diagonal.
        init_batches: the number of micro-batches of the training data that the initialisation reads.
        plain: start LoRA in the usual way instead, for comparison.
        seed: the seed of the order of the data and of the sketch.
        out: the folder for the adapter and for `evaluation.json`.
        metrics: the metrics of the test items: "exact_match", "matthews".
        tasks: tasks of lm-evaluation-harness to run after the training: names, or mappings that override settings of a
            task.
        num_fewshot: the number of examples in the prompts of those `tasks` that do not set it themselves.
        visual: benchmarks of `lora_one.finetune.evaluation.visual` to run after the training.
        evaluate: False leaves out `tasks` and `visual`.
        limit: the largest number of items of each benchmark; None is all.
        allow_code_execution: let tasks run the code that the model writes, with the rights of this process.
        save_every: the number of training steps between two checkpoints in `out/checkpoints`; None writes none.
        resume: continue from the newest checkpoint in `out`, if there is one.
        config: the initialisation.
    """

    model: str | None = None
    data: str | Source | None = None
    test: str | Source | None = None
    valid: str | Source | None = None
    valid_share: float | None = None
    loss_on: LossOn = "answers"
    chat_template: bool = True
    packing: bool = False
    backend: str = "torch"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    steps: int = 200
    epochs: float | None = None
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: int = 10
    warmup_ratio: float | None = None
    max_length: int | None = None
    eval_every: int | None = None
    keep_best: bool = False
    early_stopping: int | None = None
    report_to: tuple[str, ...] = ()
    precondition: bool = False
    reg: float = 1e-6
    damping: Damping = "absolute"
    init_batches: int = 8
    plain: bool = False
    seed: int = 0
    out: str = "runs/adapter"
    metrics: tuple[str, ...] = ("exact_match",)
    tasks: tuple[Task, ...] = ()
    num_fewshot: int | None = None
    visual: tuple[str, ...] = ()
    evaluate: bool = True
    limit: int | None = None
    allow_code_execution: bool = False
    save_every: int | None = None
    resume: bool = False
    config: Config = field(default_factory=Config)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", _check_tasks(self.tasks))
        for name in ("metrics", "visual", "report_to"):
            object.__setattr__(self, name, check_texts(name, getattr(self, name)))
        for name in ("data", "test", "valid"):
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, make_source(getattr(self, name), name))
        self._check_texts()
        self._check_numbers()
        unknown = sorted(set(self.metrics) - METRICS.keys())
        if unknown or not self.metrics:
            raise ConfigError(f"metrics must be {' or '.join(METRICS)}, got {', '.join(unknown) or 'none'}")
        if (self.model is None) != (self.data is None):
            given, missing = ("model", "data") if self.data is None else ("data", "model")
            raise ConfigError(f"{given} is given without {missing}: give both, or neither for the embedded ones")
        self._check_combinations()
        for name, default in TORCH_ONLY.items():
            if self.backend != "torch" and getattr(self, name) != default:
                instead = " (metrics.jsonl in out has the losses)" if name == "report_to" else ""
                raise ConfigError(f"{name} needs the backend torch so far, got {self.backend!r}: leave it out{instead}")

    def _check_texts(self) -> None:
        for name in ("backend", "out"):
            check_text(name, getattr(self, name))
        for name in ("model", "data", "test", "valid", "device"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Source):
                check_text(name, value)
        for setting in dataclasses.fields(self):
            if get_origin(setting.type) is Literal:
                check_choice(setting.name, getattr(self, setting.name), get_args(setting.type))
            if setting.type is bool:
                check_flag(setting.name, getattr(self, setting.name))

    def _check_combinations(self) -> None:
        """Check settings that make no sense without another one."""
        if self.packing and self.max_length is None:
            raise ConfigError("packing needs max_length, the tokens of a row: give it")
        for name in ("keep_best", "early_stopping"):
            if getattr(self, name) and self.eval_every is None:
                raise ConfigError(f"{name} needs eval_every, the steps between two measurements: give it")
        if self.valid is not None and self.valid_share is not None:
            raise ConfigError("valid and valid_share both say what is held out: give one of them")

    def _check_numbers(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "init_batches"):
            check_integer(name, getattr(self, name), least=1)
        check_integer("warmup", self.warmup, least=0)
        check_integer("seed", self.seed, least=0, most=MAX_SEED)
        check_positive("learning_rate", self.learning_rate)
        check_range("weight_decay", self.weight_decay, 0.0)
        check_range("max_grad_norm", self.max_grad_norm, 0.0)
        check_range("reg", self.reg, 0.0)
        for name in ("max_length", "limit", "save_every", "eval_every", "early_stopping"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)
        if self.num_fewshot is not None:
            check_integer("num_fewshot", self.num_fewshot, least=0)
        if self.epochs is not None:
            check_positive("epochs", self.epochs)
        for name in ("warmup_ratio", "valid_share"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0.0, 1.0)

    def for_examples(self, count: int) -> "Recipe":
        """Return this recipe with `epochs` and `warmup_ratio` turned into steps, for `count` training sequences."""
        steps, warmup = self.steps, self.warmup
        if self.epochs is not None:
            steps = math.ceil(self.epochs * math.ceil(math.ceil(count / self.batch_size) / self.accumulation))
        if self.warmup_ratio is not None:
            warmup = math.ceil(self.warmup_ratio * steps)
        return dataclasses.replace(self, steps=steps, epochs=None, warmup=warmup, warmup_ratio=None)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return the settings in a file, by name. The settings of `Recipe` and of `Config` stand side by side in it.

    Args:
        path: a .toml, .yaml or .yml file. Its section `notes` is ignored.

    Raises:
        ConfigError: the file cannot be read, or a setting does not exist. `make_recipe` checks the values.
    """
    values = read_settings(Path(path))
    values.pop(NOTES, None)
    names = _names(Recipe) | _names(Config)
    unknown = sorted(map(str, set(values) - names))
    if unknown:
        raise ConfigError(f"{path}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(names))}")
    return values


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Return the `Recipe` that settings of `Recipe` and `Config` describe; `seed` sets both seeds.

    Raises:
        ConfigError: a value is invalid; the message names the setting.
    """
    recipe = {name: value for name, value in values.items() if name in _names(Recipe)}
    config = {name: value for name, value in values.items() if name in _names(Config)}
    return Recipe(**parsed(Recipe, recipe), config=Config(**parsed(Config, config)))


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} - {"config"}


def _check_tasks(tasks: object) -> tuple[Task, ...]:
    if isinstance(tasks, (str, Mapping)) or not isinstance(tasks, Iterable):
        raise ConfigError(f"tasks must be a list, got {shown(tasks)}")
    checked = tuple(tasks)
    for task in checked:
        if not isinstance(task.get("task") if isinstance(task, Mapping) else task, str):
            raise ConfigError(f'tasks must be names, or settings with the name as "task", got {shown(task)}')
    return checked
