"""Fine-tuning a Llama-family language model from a local Hugging Face folder, with nnx.Optimizer and optax."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.flax import load_file, save_file
from transformers import AutoTokenizer

from lora_one.backends.jax.llama.files import load_llama
from lora_one.backends.jax.llama.model import causal_lm_loss
from lora_one.backends.jax.optimizer import optimizer
from lora_one.errors import ConfigError, ModelError
from lora_one.finetune.data import TokenSequence
from lora_one.finetune.fit import Limits, check_tokenizer, pad_token
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.runs import NOWHERE, Checkpoints

IGNORED = -100
STATE = "state.safetensors"  # of a checkpoint
WIDTHS = 16  # batches are padded to a multiple of it, so that few shapes are compiled


def open_tuner(folder: Path, dtype: str, device: str | None) -> "JaxTuner":
    """See `lora_one.finetune.tuners.interface.Tuner`.

    Raises:
        ConfigError: no such device.
        ModelError, CheckpointError: the folder holds no model of the Llama family, or no tokenizer that ends texts.
    """
    try:
        where = None if device is None else jax.devices(device)[0]
    except RuntimeError as error:
        names = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise ConfigError(f"device must be one that JAX has ({names}), got {device!r}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} must hold a causal language model and its tokenizer: {error}") from error
    check_tokenizer(tokenizer, folder)
    with jax.default_device(where):
        return JaxTuner(load_llama(folder, jnp.dtype(dtype)), tokenizer)


class JaxTuner:
    """See `lora_one.finetune.tuners.interface.Tuner`."""

    separate = False

    def __init__(self, model: Any, tokenizer: Any):
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        self.limits = Limits(config.vocab_size, trained=config.max_position_embeddings)  # it rotates: no table ends
        self._pad = pad_token(tokenizer, self.limits.rows)

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> list[dict[str, np.ndarray]]:
        return [self._collate(sequences[i : i + batch_size]) for i in range(0, len(sequences), batch_size)]

    def loss_fn(self, model: Any, batch: dict[str, Any]) -> jax.Array:
        return causal_lm_loss(model, batch)

    def mean_loss(self, batches: list[dict[str, np.ndarray]]) -> float:
        self.model.eval()
        loss: Any = nnx.jit(causal_lm_loss)
        return float(np.mean([np.asarray(loss(self.model, batch)) for batch in batches]))

    def train(
        self,
        sequences: Sequence[TokenSequence],
        recipe: Recipe,
        on_step: Callable[[int, float], None],
        checkpoints: Checkpoints = NOWHERE,
    ) -> None:
        # As transformers' Trainer does it: linear warmup and decay, gradients clipped at norm 1.
        rate = optax.join_schedules(
            [
                optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup),
                optax.linear_schedule(recipe.learning_rate, 0.0, max(1, recipe.steps - recipe.warmup)),
            ],
            [recipe.warmup],
        )
        adamw = optimizer(
            self.model,
            learning_rate=rate,
            weight_decay=recipe.weight_decay,
            precondition=recipe.precondition,
            reg=recipe.reg,
            damping=recipe.damping,  # type: ignore[arg-type]
        )
        state = nnx.Optimizer(self.model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.LoRAParam)
        factors = nnx.DiffState(0, nnx.LoRAParam)

        @nnx.jit
        def step(model: Any, state: nnx.Optimizer, batch: Any) -> jax.Array:
            loss, gradients = nnx.value_and_grad(causal_lm_loss, argnums=factors)(model, batch)
            state.update(model, gradients)
            return loss

        self.model.train()
        if checkpoints.start:
            _restore(checkpoints.start.path, self.model, state)
        batches = enumerate(self._draws(sequences, recipe), start=1)
        for number, batch in itertools.islice(batches, checkpoints.done, None):
            on_step(number, float(step(self.model, state, batch)))
            if checkpoints.due(number):
                checkpoints.write(number, lambda folder: _store(folder, self.model, state))

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        self.model.eval()
        end, rows = self.tokenizer.eos_token_id, 128
        found: list[list[int]] = []
        for start in range(0, len(prompts), rows):
            part = prompts[start : start + rows]
            length = np.array([len(prompt) for prompt in part] + [1] * (rows - len(part)))
            width = _padded(int(length.max()) + max_new_tokens)
            tokens = np.full((rows, width), self._pad, np.int32)
            for row, prompt in enumerate(part):
                tokens[row, : len(prompt)] = prompt
            for _ in range(max_new_tokens):
                tokens[np.arange(rows), length] = _next_tokens(self.model, tokens, length)
                length = length + 1
            for row, prompt in enumerate(part):
                answer = tokens[row, len(prompt) : length[row]].tolist()
                found.append(answer[: answer.index(end)] if end in answer else answer)
        return found

    def _draws(self, sequences: Sequence[TokenSequence], recipe: Recipe) -> Iterator[dict[str, np.ndarray]]:
        order = random.Random(recipe.seed)
        waiting: list[TokenSequence] = []
        for _ in range(recipe.steps):
            while len(waiting) < recipe.batch_size:
                waiting += order.sample(list(sequences), len(sequences))
            batch, waiting = waiting[: recipe.batch_size], waiting[recipe.batch_size :]
            yield self._collate(batch)

    def _collate(self, sequences: Sequence[TokenSequence]) -> dict[str, np.ndarray]:
        width = _padded(max(len(sequence.tokens) for sequence in sequences))
        tokens = np.full((len(sequences), width), self._pad, np.int32)
        labels = np.full_like(tokens, IGNORED)
        for row, sequence in enumerate(sequences):
            length = len(sequence.tokens)
            tokens[row, :length] = sequence.tokens
            labels[row, sequence.prompt_length : length] = sequence.tokens[sequence.prompt_length :]
        return {"input_ids": tokens, "labels": labels}


def _store(folder: Path, model: Any, optimizer: nnx.Optimizer) -> None:
    """Write the factors and the optimizer's state, each array under its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(_state(model, optimizer))
    save_file({jax.tree_util.keystr(path): leaf for path, leaf in leaves}, folder / STATE)


def _restore(folder: Path, model: Any, optimizer: nnx.Optimizer) -> None:
    """Bring back what `_store` wrote, each array to where the one in its place is."""
    arrays = load_file(folder / STATE)
    factors, moments = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(arrays[jax.tree_util.keystr(path)], leaf.sharding), _state(model, optimizer)
    )
    nnx.update(model, factors)
    nnx.update(optimizer, moments)


def _state(model: Any, optimizer: nnx.Optimizer) -> tuple[Any, Any]:
    return nnx.state(model, nnx.LoRAParam), nnx.state(optimizer)


def _padded(width: int) -> int:
    return -(-width // WIDTHS) * WIDTHS


@nnx.jit
def _next_tokens(model: Any, tokens: Any, length: Any) -> jax.Array:
    """The likeliest token after each row's first `length` ones, (rows,)."""
    logits = model(tokens)
    last = jnp.take_along_axis(logits, (length - 1)[:, None, None], axis=1)[:, 0]
    return jnp.argmax(last, axis=-1)
