"""What the command needs of a framework: a language model that it can fine-tune."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lora_one.finetune.checkpoints import NEVER, Checkpoints
from lora_one.finetune.encoding import Tokenizer, TokenSequence
from lora_one.finetune.fit import Limits
from lora_one.finetune.recipe import Recipe

OnStep = Callable[[int, float], None]  # told the number of a step, from 1, and the loss of its batch


class Tuner(Protocol):
    """A language model and its tokenizer, as the command uses them.

    Attributes:
        model: the model; with LoRA layers once LoRA is started.
        tokenizer: the tokenizer of the model.
        separate: the model is an encoder-decoder, in which prompt and completion are separate sequences.
        limits: the tokens and lengths that the model accepts.
    """

    model: Any
    tokenizer: Tokenizer
    separate: bool
    limits: Limits

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> Sequence[Any]:
        """Return padded batches, in order, for `init` with `loss_fn`."""
        ...

    def loss_fn(self, model: Any, batch: Any) -> Any:
        """Return the mean cross-entropy over the tokens after the prompts."""
        ...

    def mean_loss(self, batches: Sequence[Any]) -> float:
        """Return the mean of `loss_fn` over batches, without dropout or gradients."""
        ...

    def train(
        self, sequences: Sequence[TokenSequence], recipe: Recipe, on_step: OnStep, checkpoints: Checkpoints = NEVER
    ) -> None:
        """Train the LoRA factors of the model up to step `recipe.steps`.

        The batch of a step is drawn from a seeded permutation of the sequences, epoch after epoch.

        Args:
            sequences: the training data.
            recipe: the settings, with `steps` and `warmup` as numbers.
            on_step: called after each step.
            checkpoints: when to write a checkpoint, and which one to continue from. For the latter, the model has its
                LoRA layers already, and their factors come from the checkpoint. The remaining steps are bit for bit
                those of a run without a break.
        """
        ...

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Return greedy continuations of the prompts, up to and without the end-of-sequence token."""
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
