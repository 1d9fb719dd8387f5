"""Fine-tuning a causal language model from a local folder with mlx-lm's own training loop."""

import io
import itertools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from lora_one.backends.interface import IGNORED
from lora_one.backends.mlx.attach import random_key, set_random_key
from lora_one.backends.mlx.lora_adamw import LearningRate, LoraOneAdamW
from lora_one.backends.mlx.optimizer import optimizer
from lora_one.backends.mlx.pretrained import load_pretrained
from lora_one.errors import ConfigError, ModelError
from lora_one.finetune.checkpoints import NEVER, Checkpoints
from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.fit import check_tokenizer
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.template import Tokenizer
from lora_one.finetune.tuners.interface import AfterStep, OnStep, untold
from lora_one.finetune.tuners.shared import STATE, chunks, draw_steps, padded, rounded_up, until_end

from .limits import limits_of
from .packing import check_packing, loss_of_rows
from .training import clipped, unchanged_layers

Batch = dict[str, mx.array]  # "input_ids" and "labels", (sequences, width); packed rows have "position_ids" too

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
    # mlx-lm's wrapper sets variables of the chat template itself; every backend renders conversations alike.
    return MlxTuner(model, tokenizer._tokenizer)


class MlxTuner:
    """A language model of mlx-lm: see `lora_one.finetune.tuners.interface.Tuner`."""

    separate = False
    reads_pictures = False
    loss_fn = staticmethod(loss_of_rows)

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits_of(model)

    def check(self, recipe: Recipe) -> None:
        if recipe.gradient_checkpointing and recipe.config.dropout:
            raise ConfigError(
                "gradient_checkpointing with dropout needs the backend torch or jax: MLX draws other zeros when it "
                "computes the activations again, and the gradient would be that of another loss. Leave one of them out"
            )
        if recipe.packing:
            check_packing(self.model, self.limits)

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> list[Batch]:
        return [_collate(group) for group in chunks(sequences, batch_size)]

    def mean_loss(self, batches: Iterable[Batch]) -> float:
        training = self.model.training
        self.model.eval()
        losses = [np.array(self.loss_fn(self.model, batch)) for batch in batches]
        self.model.train(training)
        return float(np.average(losses, weights=[_counted(batch) for batch in batches]))

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
        if checkpoints.start:
            _restore(checkpoints.start.path, self.model, adamw)
        done = checkpoints.done
        stopped = False

        def iterate(dataset: Sequence[TokenSequence], **_: object) -> Iterator[tuple[Batch, mx.array]]:
            for groups in itertools.islice(draw_steps(dataset, recipe), done, None):
                if stopped:
                    return
                batches = [_collate(group) for group in groups]
                counted = [_counted(batch) for batch in batches]
                for batch, count in zip(batches, counted, strict=True):
                    yield batch, mx.array(len(batches) * count / sum(counted))

        def after_step(step: int, loss: float) -> None:
            nonlocal stopped
            after = on_step(done + step, loss) or AfterStep()
            if checkpoints.due(done + step, after.stop):
                checkpoints.write(done + step, lambda folder: _store(folder, self.model, adamw))
            stopped = after.stop

        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # mlx-lm prints its progress
            arguments = TrainingArgs(
                batch_size=recipe.batch_size,
                iters=(recipe.steps - done) * recipe.accumulation,
                steps_per_report=recipe.accumulation,
                steps_per_save=recipe.steps * recipe.accumulation + 1,
                adapter_file=str(Path(folder) / "adapters.safetensors"),  # not kept: the caller saves
                grad_checkpoint=recipe.gradient_checkpointing,
                grad_accumulation_steps=recipe.accumulation,
            )
            with unchanged_layers(self.model):
                train(
                    self.model,
                    clipped(adamw, recipe.max_grad_norm),
                    sequences,
                    args=arguments,
                    loss=_weighted_loss,
                    iterate_batches=iterate,
                    training_callback=_OnStep(after_step, recipe.accumulation),
                )
        self.model.eval()

    def trained_arrays(self) -> dict[str, np.ndarray]:
        arrays = dict(tree_flatten(self.model.trainable_parameters()))
        return {name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}

    def set_trained_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        trained: Any = tree_flatten(self.model.trainable_parameters())
        self.model.update(tree_unflatten([(name, mx.array(arrays[name]).astype(x.dtype)) for name, x in trained]))

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, tell: Callable[[int], None] = untold
    ) -> list[list[int]]:
        self.model.eval()
        by_length: dict[int, list[int]] = defaultdict(list)  # prompts of equal length need no padding
        for index, prompt in enumerate(prompts):
            by_length[len(prompt)].append(index)
        answers: list[list[int]] = [[] for _ in prompts]
        done = 0
        for indices in by_length.values():
            for group in chunks(indices, GENERATED_AT_ONCE):
                rows = self._continue([prompts[index] for index in group], max_new_tokens)
                for index, row in zip(group, rows, strict=True):
                    answers[index] = until_end(row, self.tokenizer.eos_token_id)
                done += len(group)
                tell(done)
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
    # Padding on the right is never read, whatever it is.
    return {name: mx.array(array) for name, array in padded(sequences, width, pad=0).items()}


def _counted(batch: Batch) -> int:
    return int(np.sum(np.array(batch["labels"])[:, 1:] != IGNORED))


def _weighted_loss(model: nn.Module, batch: Batch, weight: mx.array) -> tuple[mx.array, mx.array]:
    """Return the loss times a weight, and a count that mlx-lm only prints.

    mlx-lm takes the mean over the micro-batches of a step. With the weights it is the mean over their tokens.
    """
    return loss_of_rows(model, batch) * weight, mx.array(1)


def _schedule(recipe: Recipe) -> LearningRate:
    """Return transformers' schedules: linear, up for `warmup` steps, and then as the recipe says."""
    warmup = min(recipe.warmup, recipe.steps)
    rate, steps = recipe.learning_rate, max(1, recipe.steps - warmup)
    down: Any = {
        "linear": optimizers.linear_schedule(rate, 0.0, steps),
        "cosine": optimizers.cosine_decay(rate, steps),
        "constant": optimizers.linear_schedule(rate, rate, steps),
    }[recipe.schedule]
    if warmup == 0:
        return down
    up: Any = optimizers.linear_schedule(0.0, rate, warmup)
    return optimizers.join_schedules([up, down], [warmup])


class _OnStep(TrainingCallback):
    def __init__(self, on_step: Callable[[int, float], None], accumulation: int):
        self._on_step = on_step
        self._accumulation = accumulation
        self._stdout = sys.stdout

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        with redirect_stdout(self._stdout):
            self._on_step(train_info["iteration"] // self._accumulation, float(train_info["train_loss"]))
