"""Fine-tuning a causal language model from a local folder with mlx-lm's own training loop."""

import io
import itertools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train

from lora_one.backends.mlx.attach import random_key, set_random_key
from lora_one.backends.mlx.lora_adamw import LearningRate, LoraOneAdamW
from lora_one.backends.mlx.optimizer import optimizer
from lora_one.backends.mlx.passes.batches import default_loss
from lora_one.backends.mlx.pretrained import load_pretrained
from lora_one.errors import ModelError
from lora_one.finetune.checkpoints import NEVER, Checkpoints
from lora_one.finetune.encoding import Tokenizer, TokenSequence
from lora_one.finetune.fit import check_tokenizer
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.tuners.interface import OnStep
from lora_one.finetune.tuners.shared import STATE, chunks, draw_batches, rounded_up, until_end

from .limits import limits_of

Batch = tuple[mx.array, mx.array]  # tokens (sequences, width); first and last token of the loss (sequences, 2)

WIDTH_MULTIPLE = 8  # widths are multiples of it, since each width is compiled once
GENERATED_AT_ONCE = 128


def open_tuner(folder: Path, dtype: str, device: str | None) -> "MlxTuner":
    """Open a model that mlx-lm can load: see `lora_one.finetune.tuners.interface.TunerModule`.

    Args:
        device: "gpu", the default on Apple silicon, or "cpu".

    Raises:
        ModelError: the folder holds no model that mlx-lm can load, or no tokenizer; or there is no such device.
    """
    if device not in (None, "cpu", "gpu"):
        raise ModelError(f'device must be "cpu" or "gpu" for MLX, got {device!r}')
    if device is not None:
        mx.set_default_device(mx.Device(mx.cpu if device == "cpu" else mx.gpu))
    try:
        model, tokenizer = load_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:  # a wrong setting of mlx-lm's dataclasses: TypeError
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{folder} must hold a causal language model that mlx-lm knows: {error}") from error
    if tokenizer is None:
        raise ModelError(f"{folder} must hold a tokenizer, got none")
    check_tokenizer(tokenizer, folder)
    model.set_dtype(getattr(mx, dtype))
    return MlxTuner(model, tokenizer)


class MlxTuner:
    """A language model of mlx-lm: see `lora_one.finetune.tuners.interface.Tuner`."""

    separate = False
    loss_fn = staticmethod(default_loss)

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits_of(model)

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> list[Batch]:
        return [_collate(group) for group in chunks(sequences, batch_size)]

    def mean_loss(self, batches: Sequence[Batch]) -> float:
        self.model.eval()
        return float(np.mean([np.array(self.loss_fn(self.model, batch)) for batch in batches]))

    def train(
        self, sequences: Sequence[TokenSequence], recipe: Recipe, on_step: OnStep, checkpoints: Checkpoints = NEVER
    ) -> None:
        mx.random.seed(recipe.seed)
        adamw = optimizer(
            self.model,
            learning_rate=_schedule(recipe),
            weight_decay=recipe.weight_decay,
            precondition=recipe.precondition,
            reg=recipe.reg,
            damping=recipe.damping,
        )
        done = checkpoints.done
        if checkpoints.start:
            _restore(checkpoints.start.path, self.model, adamw)

        def iterate(dataset: Sequence[TokenSequence], batch_size: int, **_: object) -> Iterator[Batch]:
            return map(_collate, itertools.islice(draw_batches(dataset, batch_size, recipe.seed), done, None))

        def after_step(step: int, loss: float) -> None:
            on_step(done + step, loss)
            if checkpoints.due(done + step):
                checkpoints.write(done + step, lambda folder: _store(folder, self.model, adamw))

        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # mlx-lm prints its progress
            arguments = TrainingArgs(
                batch_size=recipe.batch_size,
                iters=recipe.steps - done,
                steps_per_report=1,
                steps_per_save=recipe.steps + 1,
                adapter_file=str(Path(folder) / "adapters.safetensors"),  # not kept: the caller saves
            )
            train(
                self.model,
                adamw,
                sequences,
                args=arguments,
                iterate_batches=iterate,
                training_callback=_OnStep(after_step),
            )
        self.model.eval()

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        self.model.eval()
        by_length: dict[int, list[int]] = defaultdict(list)  # prompts of equal length need no padding
        for index, prompt in enumerate(prompts):
            by_length[len(prompt)].append(index)
        answers: list[list[int]] = [[] for _ in prompts]
        for indices in by_length.values():
            for group in chunks(indices, GENERATED_AT_ONCE):
                rows = self._continue([prompts[index] for index in group], max_new_tokens)
                for index, row in zip(group, rows, strict=True):
                    answers[index] = until_end(row, self.tokenizer.eos_token_id)
        return answers

    def _continue(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Return greedy continuations of prompts of equal length, of `max_new_tokens` or until all have ended."""
        model: Any = self.model
        cache = make_prompt_cache(model)
        tokens, columns = mx.array(prompts), []
        ended = mx.zeros((len(prompts),), dtype=mx.bool_)
        for _ in range(max_new_tokens):
            tokens = mx.argmax(model(tokens, cache=cache)[:, -1:], axis=-1)  # (prompts, 1)
            columns.append(tokens)
            ended = ended | (tokens[:, 0] == self.tokenizer.eos_token_id)
            if bool(mx.all(ended).item()):
                break
        rows: list[list[int]] = np.array(mx.concatenate(columns, axis=1)).tolist()
        return rows


def _store(folder: Path, model: nn.Module, optimizer: LoraOneAdamW) -> None:
    """Write the factors, the optimizer's state and the state of the random stream, each array under its path."""
    state = {"model": model.trainable_parameters(), "optimizer": optimizer.state, "random": random_key()}
    mx.save_safetensors(str(folder / STATE), dict(tree_flatten(state)))


def _restore(folder: Path, model: nn.Module, optimizer: LoraOneAdamW) -> None:
    """Read what `_store` wrote."""
    arrays: Any = mx.load(str(folder / STATE))
    state: Any = tree_unflatten(list(arrays.items()))
    model.update(state["model"])
    optimizer.state = state["optimizer"]
    set_random_key(state["random"])


def _collate(sequences: Sequence[TokenSequence]) -> Batch:
    width = rounded_up(max(len(sequence.tokens) for sequence in sequences), WIDTH_MULTIPLE)
    tokens = np.zeros((len(sequences), width), dtype=np.int32)  # padding on the right is never read
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence.tokens)] = sequence.tokens
    # mlx-lm's loss counts the tokens begin <= i <= end, so the last one is len(tokens) - 1.
    ends = [(sequence.prompt_length, len(sequence.tokens) - 1) for sequence in sequences]
    return mx.array(tokens), mx.array(ends)


def _schedule(recipe: Recipe) -> LearningRate:
    """Return transformers' default schedule: linear, up for `warmup` steps and then down to zero."""
    steps = recipe.steps
    warmup = min(recipe.warmup, steps)
    down: Any = optimizers.linear_schedule(recipe.learning_rate, 0.0, max(1, steps - warmup))
    if warmup == 0:
        return down
    up: Any = optimizers.linear_schedule(0.0, recipe.learning_rate, warmup)
    return optimizers.join_schedules([up, down], [warmup])


class _OnStep(TrainingCallback):
    def __init__(self, on_step: OnStep):
        self._on_step = on_step
        self._stdout = sys.stdout

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        with redirect_stdout(self._stdout):
            self._on_step(train_info["iteration"], float(train_info["train_loss"]))
