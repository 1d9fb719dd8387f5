"""Fine-tuning a Llama-family language model from a local Hugging Face folder, with nnx.Optimizer and optax."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.fit import Limits, check_tokenizer, pad_token
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.template import Tokenizer

from .interface import AfterStep, OnStep, untold
from .shared import STATE, chunks, draw_steps, padded, rounded_up, until_end

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
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} must hold a causal language model and its tokenizer: {error}") from error
    check_tokenizer(tokenizer, folder)
    with jax.default_device(place):
        return JaxTuner(load_llama(folder, jnp.dtype(dtype)), tokenizer)


class JaxTuner:
    """A model of the Llama family in Flax NNX: see `lora_one.finetune.tuners.interface.Tuner`."""

    separate = False
    reads_pictures = False
    loss_fn = staticmethod(causal_lm_loss)

    def __init__(self, model: LlamaForCausalLM, tokenizer: Tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        self.limits = Limits(config.vocab_size, trained=config.max_position_embeddings)  # rotary: no position table
        self._pad = pad_token(tokenizer, self.limits.rows)

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> list[Batch]:
        return [self._collate(group) for group in chunks(sequences, batch_size)]

    def check(self, recipe: Recipe) -> None:
        """Every setting of a recipe is allowed here."""

    def mean_loss(self, batches: Iterable[Batch]) -> float:
        self.model.eval()
        losses = [np.asarray(_loss(self.model, batch)) for batch in batches]
        return float(np.average(losses, weights=[_counted(batch) for batch in batches]))

    def train(
        self, sequences: Sequence[TokenSequence], recipe: Recipe, on_step: OnStep, checkpoints: Checkpoints = NEVER
    ) -> None:
        adamw = optimizer(
            self.model,
            learning_rate=_schedule(recipe),
            weight_decay=recipe.weight_decay,
            precondition=recipe.precondition,
            reg=recipe.reg,
            damping=recipe.damping,
        )
        clip = optax.clip_by_global_norm(recipe.max_grad_norm) if recipe.max_grad_norm else optax.identity()
        state = nnx.Optimizer(self.model, optax.chain(clip, adamw), wrt=nnx.LoRAParam)
        self.model.model.checkpointing = recipe.gradient_checkpointing
        self.model.train()
        if checkpoints.start:
            _restore(checkpoints.start.path, self.model, state)
        draws = enumerate(draw_steps(sequences, recipe), start=1)
        for number, groups in itertools.islice(draws, checkpoints.done, recipe.steps):
            total = sum(sequence.counted for group in groups for sequence in group)
            loss, gradients = 0.0, None
            for batch in map(self._collate, groups):
                part, gradient = _gradients(self.model, batch, _counted(batch) / total)
                loss += float(part)
                gradients = gradient if gradients is None else jax.tree.map(jnp.add, gradients, gradient)
            _update(self.model, state, gradients)
            after = on_step(number, loss) or AfterStep()
            if checkpoints.due(number, after.stop):
                checkpoints.write(number, lambda folder: _store(folder, self.model, state))
            if after.stop:
                break
            if after.loss is not None:  # the measurement has left the model in its other mode
                self.model.train()
        self.model.model.checkpointing = False

    def trained_arrays(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(leaf, np.float32) for name, leaf in _by_path(nnx.state(self.model, nnx.LoRAParam))}

    def set_trained_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        state = nnx.state(self.model, nnx.LoRAParam)
        nnx.update(self.model, _filled(state, arrays))

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, tell: Callable[[int], None] = untold
    ) -> list[list[int]]:
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
            tell(len(answers))
        return answers

    def _collate(self, sequences: Sequence[TokenSequence]) -> Batch:
        width = rounded_up(max(len(sequence.tokens) for sequence in sequences), WIDTH_MULTIPLE)
        return padded(sequences, width, self._pad)


_loss: Any = nnx.jit(causal_lm_loss)


@nnx.jit
def _gradients(model: LlamaForCausalLM, batch: Batch, share: Any) -> tuple[jax.Array, Any]:
    """Return the loss of a micro-batch and its gradient, times its share of the tokens of the step."""
    factors = nnx.DiffState(0, nnx.LoRAParam)
    result = nnx.value_and_grad(causal_lm_loss, argnums=factors)(model, batch)
    scaled: tuple[jax.Array, Any] = jax.tree.map(lambda x: x * jnp.asarray(share, x.dtype), result)
    return scaled


@nnx.jit
def _update(model: LlamaForCausalLM, state: nnx.Optimizer, gradients: Any) -> None:
    state.update(model, gradients)


def _schedule(recipe: Recipe) -> optax.Schedule:
    """Return transformers' schedules: linear, up for `warmup` steps, and then as the recipe says."""
    rate, steps = recipe.learning_rate, max(1, recipe.steps - recipe.warmup)
    after = {
        "linear": optax.linear_schedule(rate, 0.0, steps),
        "cosine": optax.cosine_decay_schedule(rate, steps),
        "constant": optax.constant_schedule(rate),
    }
    up = optax.linear_schedule(0.0, rate, recipe.warmup)
    return optax.join_schedules([up, after[recipe.schedule]], [recipe.warmup])


def _counted(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _store(folder: Path, model: LlamaForCausalLM, optimizer: nnx.Optimizer) -> None:
    """Write factors, the positions of dropout's streams and the optimizer's state, each array under its path."""
    save_file(dict(_by_path(_state(model, optimizer))), folder / STATE)


def _restore(folder: Path, model: LlamaForCausalLM, optimizer: nnx.Optimizer) -> None:
    """Read what `_store` wrote."""
    factors, moments = _filled(_state(model, optimizer), load_file(folder / STATE))
    nnx.update(model, factors)
    nnx.update(optimizer, moments)


def _state(model: LlamaForCausalLM, optimizer: nnx.Optimizer) -> tuple[Any, Any]:
    return nnx.state(model, (nnx.LoRAParam, nnx.RngCount)), nnx.state(optimizer)


def _by_path(tree: Any) -> list[tuple[str, jax.Array]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _filled(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """Return a tree with the arrays of its paths. Each goes to the device of the array that it replaces."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(jnp.asarray(arrays[jax.tree_util.keystr(path)], leaf.dtype), leaf.sharding),
        tree,
    )


@nnx.jit
def _next_tokens(model: LlamaForCausalLM, tokens: Any, length: Any) -> jax.Array:
    """Return the most likely token after the first `length` tokens of each row, (rows,)."""
    logits = model(tokens)
    last = jnp.take_along_axis(logits, (length - 1)[:, None, None], axis=1)[:, 0]
    return jnp.argmax(last, axis=-1)
