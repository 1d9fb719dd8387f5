"""Fine-tuning a Llama-family language model from a local Hugging Face folder, with nnx.Optimizer and optax."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.flax import load_file, save_file
from transformers import AutoTokenizer

from lora_one.backends.interface import IGNORED
from lora_one.backends.jax.llama.files import load_llama
from lora_one.backends.jax.llama.model import LlamaForCausalLM, causal_lm_loss
from lora_one.backends.jax.optimizer import optimizer
from lora_one.errors import ConfigError, ModelError
from lora_one.finetune.checkpoints import NEVER, Checkpoints
from lora_one.finetune.encoding import Tokenizer, TokenSequence
from lora_one.finetune.fit import Limits, check_tokenizer, pad_token
from lora_one.finetune.recipe import Recipe

from .interface import OnStep
from .shared import STATE, chunks, draw_batches, rounded_up, until_end

WIDTH_MULTIPLE = 16  # batches are padded to a multiple of it, so that few shapes are compiled
GENERATED_AT_ONCE = 128

Batch = dict[str, np.ndarray]  # "input_ids" and "labels", (sequences, width)


def open_tuner(folder: Path, dtype: str, device: str | None) -> "JaxTuner":
    """Open a model of the Llama family: see `lora_one.finetune.tuners.interface.TunerModule`.

    Raises:
        ConfigError: JAX has no such device.
        ModelError, CheckpointError: the folder holds no model of the Llama family, or its tokenizer has no
            end-of-sequence token.
    """
    try:
        place = None if device is None else jax.devices(device)[0]
    except RuntimeError as error:
        names = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise ConfigError(f"device must be one that JAX has ({names}), got {device!r}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} must hold a causal language model and its tokenizer: {error}") from error
    check_tokenizer(tokenizer, folder)
    with jax.default_device(place):
        return JaxTuner(load_llama(folder, jnp.dtype(dtype)), tokenizer)


class JaxTuner:
    """A model of the Llama family in Flax NNX: see `lora_one.finetune.tuners.interface.Tuner`."""

    separate = False
    loss_fn = staticmethod(causal_lm_loss)

    def __init__(self, model: LlamaForCausalLM, tokenizer: Tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        self.limits = Limits(config.vocab_size, trained=config.max_position_embeddings)  # rotary: no position table
        self._pad = pad_token(tokenizer, self.limits.rows)

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> list[Batch]:
        return [self._collate(group) for group in chunks(sequences, batch_size)]

    def mean_loss(self, batches: Sequence[Batch]) -> float:
        self.model.eval()
        loss: Any = nnx.jit(causal_lm_loss)
        return float(np.mean([np.asarray(loss(self.model, batch)) for batch in batches]))

    def train(
        self, sequences: Sequence[TokenSequence], recipe: Recipe, on_step: OnStep, checkpoints: Checkpoints = NEVER
    ) -> None:
        # Like transformers' Trainer: linear warm-up and decay, gradients clipped at norm 1.
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
            damping=recipe.damping,
        )
        state = nnx.Optimizer(self.model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.LoRAParam)
        factors = nnx.DiffState(0, nnx.LoRAParam)

        @nnx.jit
        def step(model: LlamaForCausalLM, state: nnx.Optimizer, batch: Batch) -> jax.Array:
            loss, gradients = nnx.value_and_grad(causal_lm_loss, argnums=factors)(model, batch)
            state.update(model, gradients)
            return loss

        self.model.train()
        if checkpoints.start:
            _restore(checkpoints.start.path, self.model, state)
        draws = enumerate(draw_batches(sequences, recipe.batch_size, recipe.seed), start=1)
        for number, group in itertools.islice(draws, checkpoints.done, recipe.steps):
            on_step(number, float(step(self.model, state, self._collate(group))))
            if checkpoints.due(number):
                checkpoints.write(number, lambda folder: _store(folder, self.model, state))

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        self.model.eval()
        rows = GENERATED_AT_ONCE
        answers: list[list[int]] = []
        for group in chunks(prompts, rows):
            length = np.array([len(prompt) for prompt in group] + [1] * (rows - len(group)))  # (rows,)
            width = rounded_up(int(length.max()) + max_new_tokens, WIDTH_MULTIPLE)
            tokens = np.full((rows, width), self._pad, np.int32)
            for row, prompt in enumerate(group):
                tokens[row, : len(prompt)] = prompt
            for _ in range(max_new_tokens):
                tokens[np.arange(rows), length] = _next_tokens(self.model, tokens, length)
                length = length + 1
            for row, prompt in enumerate(group):
                answer = tokens[row, len(prompt) : length[row]].tolist()
                answers.append(until_end(answer, self.tokenizer.eos_token_id))
        return answers

    def _collate(self, sequences: Sequence[TokenSequence]) -> Batch:
        width = rounded_up(max(len(sequence.tokens) for sequence in sequences), WIDTH_MULTIPLE)
        tokens = np.full((len(sequences), width), self._pad, np.int32)
        labels = np.full_like(tokens, IGNORED)
        for row, sequence in enumerate(sequences):
            length = len(sequence.tokens)
            tokens[row, :length] = sequence.tokens
            labels[row, sequence.prompt_length : length] = sequence.tokens[sequence.prompt_length :]
        return {"input_ids": tokens, "labels": labels}


def _store(folder: Path, model: LlamaForCausalLM, optimizer: nnx.Optimizer) -> None:
    """Write factors, the positions of dropout's streams and the optimizer's state, each array under its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(_state(model, optimizer))
    save_file({jax.tree_util.keystr(path): leaf for path, leaf in leaves}, folder / STATE)


def _restore(folder: Path, model: LlamaForCausalLM, optimizer: nnx.Optimizer) -> None:
    """Read what `_store` wrote. Each array goes to the device of the array that it replaces."""
    arrays = load_file(folder / STATE)
    factors, moments = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(arrays[jax.tree_util.keystr(path)], leaf.sharding), _state(model, optimizer)
    )
    nnx.update(model, factors)
    nnx.update(optimizer, moments)


def _state(model: LlamaForCausalLM, optimizer: nnx.Optimizer) -> tuple[Any, Any]:
    return nnx.state(model, (nnx.LoRAParam, nnx.RngCount)), nnx.state(optimizer)


@nnx.jit
def _next_tokens(model: LlamaForCausalLM, tokens: Any, length: Any) -> jax.Array:
    """Return the most likely token after the first `length` tokens of each row, (rows,)."""
    logits = model(tokens)
    last = jnp.take_along_axis(logits, (length - 1)[:, None, None], axis=1)[:, 0]
    return jnp.argmax(last, axis=-1)
