"""The settings of transformers' Trainer for a recipe, and the callback through which it tells of its steps."""

import dataclasses
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from lora_one.errors import ConfigError
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.tuners.interface import OnStep

# Newer versions call gradient checkpointing by its longer name, and warn of the other one.
_NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"


def training_arguments(recipe: Recipe, on_cpu: bool) -> TrainingArguments:
    """Return the Trainer's settings for a recipe whose `steps` and `warmup` are numbers."""
    return TrainingArguments(
        output_dir=str(Path(recipe.out)),
        run_name=recipe.out,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.max_grad_norm,
        logging_steps=1,
        save_strategy="no",  # `checkpoints` decides
        report_to=list(recipe.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=recipe.seed,
        use_cpu=on_cpu,
        **{_CHECKPOINTING: recipe.gradient_checkpointing, f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    )


def check_trackers(recipe: Recipe) -> None:
    """Raise ConfigError if a tracker of `report_to` is not installed here, before any work."""
    here = get_available_reporting_integrations()
    missing = [name for name in recipe.report_to if name not in here]
    if missing:
        raise ConfigError(
            f"report_to must name trackers that are installed here ({', '.join(here) or 'none is'}), got "
            f"{', '.join(missing)}: pip install it, or leave it out: metrics.jsonl in out has the losses"
        )


def open_trackers(trainer: Trainer, out: Path) -> None:
    """Let TensorBoard write below the adapter's folder; a Trainer's own folder may be one for the time of a run."""
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "logging_dir", out) is None:
            callback.logging_dir = str(out / "runs")


class OnStepCallback(TrainerCallback):
    """A callback that tells a listener of each step, and the Trainer's trackers of what the listener measured."""

    def __init__(self, on_step: OnStep, trainer: Trainer):
        self._on_step = on_step
        self._trainer = trainer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        after = self._on_step(state.global_step, float(logs["loss"]))
        if after is None:
            return
        if after.loss is not None:
            self._trainer.log({"eval_loss": after.loss})
        if after.stop:
            control.should_training_stop = True
