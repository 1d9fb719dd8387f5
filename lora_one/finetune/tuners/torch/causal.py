"""Fine-tuning a causal language model with transformers' own Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_one.backends.interface import IGNORED
from lora_one.backends.torch.optimizer import optimizer
from lora_one.backends.torch.passes.batches import default_loss
from lora_one.finetune.checkpoints import NEVER, Checkpoints
from lora_one.finetune.encoding import Tokenizer, TokenSequence
from lora_one.finetune.fit import pad_token
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.tuners.interface import OnStep
from lora_one.finetune.tuners.shared import chunks, until_end

from .checkpoints import train_with_checkpoints
from .limits import limits_of

Batch = dict[str, Tensor]


class TorchTuner:
    """A causal language model of transformers: see `lora_one.finetune.tuners.interface.Tuner`."""

    separate = False
    generated_at_once = 128
    loss_fn = staticmethod(default_loss)

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model: Any = model
        self.tokenizer = tokenizer
        self.limits = limits_of(self.model)
        self._pad = pad_token(tokenizer, self.limits.rows)

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> list[Batch]:
        return [self._collate(group) for group in chunks(sequences, batch_size)]

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Batch]) -> float:
        self.model.eval()
        losses = [self.loss_fn(self.model, send_to_device(batch, self.model.device)) for batch in batches]
        return float(torch.stack(losses).mean())

    def train(
        self, sequences: Sequence[TokenSequence], recipe: Recipe, on_step: OnStep, checkpoints: Checkpoints = NEVER
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(Path(recipe.out)),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulation,
            lr_scheduler_type=recipe.schedule,
            warmup_steps=recipe.warmup,
            logging_steps=1,
            save_strategy="no",  # `checkpoints` decides
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            seed=recipe.seed,
            use_cpu=next(self.model.parameters()).device.type == "cpu",
        )
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
            arguments,
            data_collator=self._collate,
            train_dataset=list(sequences),
            optimizers=(adamw, None),
            callbacks=[_OnStep(on_step)],
        )
        if self.separate:
            # T5 and similar models accept the number of tokens in a step but ignore it, and so the losses of the
            # micro-batches would be added up instead of averaged.
            trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        train_with_checkpoints(trainer, checkpoints)

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        self.model.eval()
        answers: list[list[int]] = []
        for group in chunks(prompts, self.generated_at_once):
            answers += self._continue(self._prompt_batch(group), max_new_tokens)
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

    def _collate(self, sequences: Sequence[TokenSequence]) -> Batch:
        width = max(len(sequence.tokens) for sequence in sequences)
        tokens = torch.full((len(sequences), width), self._pad)
        labels = torch.full_like(tokens, IGNORED)
        mask = torch.zeros_like(tokens)
        for row, sequence in enumerate(sequences):
            length = len(sequence.tokens)
            tokens[row, :length] = torch.tensor(sequence.tokens)
            mask[row, :length] = 1
            labels[row, sequence.prompt_length : length] = tokens[row, sequence.prompt_length : length]
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


class _OnStep(TrainerCallback):
    def __init__(self, on_step: OnStep):
        self._on_step = on_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if logs and "loss" in logs:
            self._on_step(state.global_step, float(logs["loss"]))
