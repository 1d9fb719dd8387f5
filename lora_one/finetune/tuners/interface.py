"""What the command needs of a framework: a language model that it can fine-tune."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_one.finetune.checkpoints import NEVER, Checkpoints
from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.fit import Limits
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.template import Tokenizer


def untold(done: int) -> None:
    """Tell nobody how many prompts are done."""


class AfterStep(NamedTuple):
    """What follows a training step."""

    loss: float | None = None  # on held-out data, if it was measured after this step
    stop: bool = False  # the training should end here


# Told the number of a step, from 1, and the loss of its batches. Nothing follows a step if it returns None.
OnStep = Callable[[int, float], AfterStep | None]


class Tuner(Protocol):
    """A language model and its tokenizer, as the command uses them.

    Attributes:
        model: the model; with LoRA layers once LoRA is started.
        tokenizer: the tokenizer of the model.
        separate: the model is an encoder-decoder, in which prompt and completion are separate sequences.
        limits: the tokens and lengths that the model accepts.
        reads_pictures: the model is one of images and text.
    """

    model: Any
    tokenizer: Tokenizer
    separate: bool
    limits: Limits
    reads_pictures: bool

    def check(self, recipe: Recipe) -> None:
        """Raise ConfigError for a setting of the training that this model, or this machine, does not allow."""
        ...

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> Sequence[Any]:
        """Return padded batches, in order, for `init` with `loss_fn`."""
        ...

    def loss_fn(self, model: Any, batch: Any) -> Any:
        """Return the mean cross-entropy over the tokens that count."""
        ...

    def mean_loss(self, batches: Iterable[Any]) -> float:
        """Return the mean cross-entropy over the tokens of all batches, without dropout or gradients."""
        ...

    def train(
        self, sequences: Sequence[TokenSequence], recipe: Recipe, on_step: OnStep, checkpoints: Checkpoints = NEVER
    ) -> None:
        """Train the LoRA factors of the model up to step `recipe.steps`.

        The batches of a step are drawn from a seeded permutation of the sequences, epoch after epoch.

        Args:
            sequences: the training data.
            recipe: the settings, with `steps` and `warmup` as numbers.
            on_step: called after each step; it may call `mean_loss` and `trained_arrays`.
            checkpoints: when to write a checkpoint, and which one to continue from. For the latter, the model has its
                LoRA layers already, and their factors come from the checkpoint. The remaining steps are bit for bit
                those of a run without a break.
        """
        ...

    def trained_arrays(self) -> dict[str, np.ndarray]:
        """Return a copy of all arrays that are trained, by path."""
        ...

    def set_trained_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Bring back what `trained_arrays` returned."""
        ...

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, tell: Callable[[int], None] = untold
    ) -> list[list[int]]:
        """Return greedy continuations of the prompts, up to and without the end-of-sequence token.

        Args:
            tell: called with the number of prompts that are done, after each group of them.
        """
        ...


class TunerModule(Protocol):
    """The module of a framework."""

    def open_tuner(self, folder: Path, dtype: str, device: str | None) -> Tuner:
        """Load a model and its tokenizer from a folder in Hugging Face's format.

        Args:
            folder: the folder with the model.
            dtype: the dtype of the weights, for instance "float32".
            device: the framework's name of a device; None is its default.

        Raises:
            ConfigError, ModelError: there is no such device, the folder holds no such model, or its tokenizer has no
                end-of-sequence token.
        """
        ...
