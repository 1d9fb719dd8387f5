"""What the command needs of a framework: a language model that it can fine-tune."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lora_one.finetune.data import TokenSequence
from lora_one.finetune.fit import Limits
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.runs import NOWHERE, Checkpoints


class Tuner(Protocol):
    """A causal language model and its tokenizer, from a local folder in Hugging Face's format: what the command uses.

    A backend that offers it has a module `tuner` with `open_tuner(folder: Path, dtype: str, device: str | None)`, which
    refuses a tokenizer without an end-of-sequence token, and `attach_plain(model, config)`, which attaches LoRA with
    its usual start, for comparison.
    """

    model: Any
    tokenizer: Any  # Hugging Face's, or one that passes `encode`, `decode` and `apply_chat_template` on to it
    separate: bool  # prompt and completion are sequences of their own: an encoder-decoder
    limits: Limits  # of what the model can be given

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> list[Any]:
        """Padded batches, in order, for `init` with `loss_fn`."""
        ...

    def loss_fn(self, model: Any, batch: Any) -> Any:
        """Mean cross-entropy over the tokens after the prompts."""
        ...

    def mean_loss(self, batches: list[Any]) -> float:
        """The mean of `loss_fn` over batches, without dropout or gradients."""
        ...

    def train(
        self,
        sequences: Sequence[TokenSequence],
        recipe: Recipe,
        on_step: Callable[[int, float], None],
        checkpoints: Checkpoints = NOWHERE,
    ) -> None:
        """Train the model's LoRA factors up to step `recipe.steps`; `on_step(step, loss)` after each.

        A step's batch is a draw from a seeded permutation of the sequences, epoch after epoch.

        Args:
            checkpoints: says after which steps to write one, and from which to go on: the LoRA layers are there then,
                their factors are the checkpoint's. The steps after it are bit for bit those of a run that never ended.
        """
        ...

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of the prompts, up to and without the end-of-sequence token."""
        ...
