"""Fine-tuning a causal language model with transformers' own Trainer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PrinterCallback, Trainer

from lora_one.backends.interface import IGNORED
from lora_one.backends.torch.optimizer import optimizer
from lora_one.backends.torch.passes.batches import default_loss
from lora_one.errors import ConfigError
from lora_one.finetune.checkpoints import NEVER, Checkpoints
from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.fit import pad_token
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.template import Tokenizer
from lora_one.finetune.tuners.interface import OnStep, untold
from lora_one.finetune.tuners.shared import chunks, padded, until_end

from .checkpoints import train_with_checkpoints
from .limits import limits_of
from .trainer import OnStepCallback, check_trackers, open_trackers, training_arguments

Batch = dict[str, Any]  # tensors, and "use_cache"

PACKED_ATTENTION = ("eager", "sdpa")  # their masks keep apart what position_ids say is another example


class TorchTuner:
    """A causal language model of transformers: see `lora_one.finetune.tuners.interface.Tuner`."""

    separate = False
    reads_pictures = False
    generated_at_once = 128
    loss_fn = staticmethod(default_loss)

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model: Any = model
        self.tokenizer = tokenizer
        self.limits = limits_of(self.model)
        self._pad = pad_token(tokenizer, self.limits.rows)

    def check(self, recipe: Recipe) -> None:
        check_trackers(recipe)
        if not recipe.packing:
            return
        if self.separate or self.reads_pictures:
            raise ConfigError("packing needs a causal language model of text alone: leave it out")
        attention = getattr(self.model.config, "_attn_implementation", None)
        if attention not in PACKED_ATTENTION:
            raise ConfigError(
                f"packing needs an attention that keeps the examples of a row apart, {' or '.join(PACKED_ATTENTION)}, "
                f"got {attention!r}: change attn_implementation in the model's config.json, or leave packing out"
            )

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> list[Batch]:
        return [self._collate(group) for group in chunks(sequences, batch_size)]

    @torch.no_grad()
    def mean_loss(self, batches: Iterable[Batch]) -> float:
        training = self.model.training
        self.model.eval()
        losses = [self.loss_fn(self.model, send_to_device(batch, self.model.device)) for batch in batches]
        self.model.train(training)
        weights = torch.tensor([self._counted(batch) for batch in batches], dtype=torch.float64)  # (batches,)
        return float(torch.stack(losses).double().cpu() @ weights / weights.sum())

    def train(
        self, sequences: Sequence[TokenSequence], recipe: Recipe, on_step: OnStep, checkpoints: Checkpoints = NEVER
    ) -> None:
        adamw = optimizer(
            self.model,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            precondition=recipe.precondition,
            reg=recipe.reg,
            damping=recipe.damping,
        )
        trainer = Trainer(
            self.model,
            training_arguments(recipe, on_cpu=next(self.model.parameters()).device.type == "cpu"),
            data_collator=self._collate,
            train_dataset=list(sequences),
            optimizers=(adamw, None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(OnStepCallback(on_step, trainer))
        open_trackers(trainer, Path(recipe.out))
        if self.separate:
            # T5 and similar models accept the number of tokens in a step but ignore it, and so the losses of the
            # micro-batches would be added up instead of averaged.
            trainer.model_accepts_loss_kwargs = False
        train_with_checkpoints(trainer, checkpoints)

    def trained_arrays(self) -> dict[str, np.ndarray]:
        return {name: x.detach().float().cpu().numpy().copy() for name, x in self._trained()}

    @torch.no_grad()
    def set_trained_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        for name, parameter in self._trained():
            parameter.copy_(torch.from_numpy(arrays[name]))

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, x) for name, x in self.model.named_parameters() if x.requires_grad)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, tell: Callable[[int], None] = untold
    ) -> list[list[int]]:
        self.model.eval()
        answers: list[list[int]] = []
        for group in chunks(prompts, self.generated_at_once):
            answers += self._continue(self._prompt_batch(group), max_new_tokens)
            tell(len(answers))
        return answers

    def _prompt_batch(self, prompts: Sequence[list[int]]) -> Batch:
        """Return a batch padded on the left, so that all prompts end where their continuations begin."""
        return self._pad_prompts(prompts, left=True)

    def _pad_prompts(self, prompts: Sequence[list[int]], left: bool) -> Batch:
        width = max(map(len, prompts))
        padding = [[self._pad] * (width - len(prompt)) for prompt in prompts]
        tokens = [pad + prompt if left else prompt + pad for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * len(pad) + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        mask = mask if left else [row[::-1] for row in mask]
        return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}

    def _continue(self, batch: Batch, max_new_tokens: int) -> list[list[int]]:
        """Return greedy continuations of a padded batch, up to and without the end-of-sequence token."""
        end = self.tokenizer.eos_token_id
        output = self.model.generate(
            **send_to_device(batch, self.model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self._pad,
            eos_token_id=end,
        )
        return [until_end(row, end) for row in output[:, self._given(batch) :].tolist()]

    def _given(self, batch: Batch) -> int:
        """Return how many leading tokens of `generate`'s result are not the model's own."""
        return batch["input_ids"].shape[1]

    def _counted(self, batch: Batch) -> int:
        """Return the number of tokens that count in the loss of a batch."""
        labels = batch["labels"] if self.separate else batch["labels"][:, 1:]
        return int((labels != IGNORED).sum())

    def _collate(self, sequences: Sequence[TokenSequence]) -> Batch:
        width = max(len(sequence.tokens) for sequence in sequences)
        batch = {name: torch.from_numpy(array).long() for name, array in padded(sequences, width, self._pad).items()}
        if "position_ids" in batch:  # without a mask, transformers sees by the positions where an example begins
            return {**batch, "use_cache": False}
        lengths = torch.tensor([[len(sequence.tokens)] for sequence in sequences])  # (sequences, 1)
        return {**batch, "attention_mask": (torch.arange(width) < lengths).long()}
