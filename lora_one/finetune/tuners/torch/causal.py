"""Fine-tuning a causal language model by transformers' own Trainer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lora_one.backends.torch.optimizer import optimizer
from lora_one.backends.torch.passes.batches import default_loss
from lora_one.finetune.data import TokenSequence
from lora_one.finetune.fit import pad_token
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.runs import NOWHERE, Checkpoints

from .checkpoints import train_with_checkpoints
from .limits import limits_of

IGNORED = -100  # transformers' label of a token that is not part of the loss


class TorchTuner:
    """See `lora_one.finetune.tuners.interface.Tuner`."""

    separate = False
    generated_at_once = 128

    def __init__(self, model: nn.Module, tokenizer: Any):
        self.model: Any = model
        self.tokenizer = tokenizer
        self.limits = limits_of(self.model)
        self._pad = pad_token(tokenizer, self.limits.rows)

    def batches(self, sequences: Sequence[TokenSequence], batch_size: int) -> list[dict[str, Tensor]]:
        return [self._collate(sequences[i : i + batch_size]) for i in range(0, len(sequences), batch_size)]

    def loss_fn(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return default_loss(model, batch)

    @torch.no_grad()
    def mean_loss(self, batches: list[dict[str, Tensor]]) -> float:
        self.model.eval()
        losses = [self.loss_fn(self.model, send_to_device(batch, self.model.device)) for batch in batches]
        return float(torch.stack(losses).mean())

    def train(
        self,
        sequences: Sequence[TokenSequence],
        recipe: Recipe,
        on_step: Callable[[int, float], None],
        checkpoints: Checkpoints = NOWHERE,
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(Path(recipe.out)),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulation,
            lr_scheduler_type=recipe.schedule,
            warmup_steps=recipe.warmup,
            logging_steps=1,
            save_strategy="no",  # but for what `checkpoints` asks for
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
            damping=recipe.damping,  # type: ignore[arg-type]
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
            # T5 and its like take the number of tokens in a step and pass over it: their losses would be summed up.
            trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        train_with_checkpoints(trainer, checkpoints)

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        self.model.eval()
        found: list[list[int]] = []
        for start in range(0, len(prompts), self.generated_at_once):
            part = prompts[start : start + self.generated_at_once]
            # Padded on the left, so that all prompts end where their continuations begin.
            found += self._continue(self._pad_prompts(part, left=True), max_new_tokens)
        return found

    def _pad_prompts(self, prompts: Sequence[list[int]], left: bool) -> dict[str, Tensor]:
        width = max(map(len, prompts))
        blank = [[self._pad] * (width - len(prompt)) for prompt in prompts]
        tokens = [b + p if left else p + b for b, p in zip(blank, prompts, strict=True)]
        mask = [[0] * len(b) + [1] * len(p) for b, p in zip(blank, prompts, strict=True)]
        mask = mask if left else [row[::-1] for row in mask]
        return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}

    def _continue(self, batch: dict[str, Tensor], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of a padded batch, up to and without the end-of-sequence token."""
        end = self.tokenizer.eos_token_id
        output = self.model.generate(
            **send_to_device(batch, self.model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self._pad,
            eos_token_id=end,
        )
        rows = output[:, self._given(batch) :].tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]

    def _given(self, batch: dict[str, Tensor]) -> int:
        """How many tokens of what `generate` returns are not the model's own."""
        return batch["input_ids"].shape[1]

    def _collate(self, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
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
    def __init__(self, on_step: Callable[[int, float], None]):
        self._on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._on_step(state.global_step, float(logs["loss"]))
