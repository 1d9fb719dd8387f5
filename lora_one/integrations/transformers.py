"""LoRA-One in the Trainer of transformers, and in trl's trainers, which are made of it."""

import copy
import logging
import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_one import api
from lora_one.backends.torch.attachment.adapters import adapter_of, opened
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.backends.torch.attachment.sharding import gathered
from lora_one.backends.torch.attachment.wrappers import unwrapped
from lora_one.backends.torch.optimizer import lora_pairs
from lora_one.backends.waiting import report_of
from lora_one.checks import check_integer
from lora_one.config import Config
from lora_one.errors import BatchError, ConfigError, ModelError
from lora_one.report import Report

__all__ = ["LoraOneCallback", "optimizer"]
_LOG = logging.getLogger(__name__)
_METRICS = ("_metrics", "_total_train_tokens")  # what trl's trainers collect, while they compute a loss, to log it


class LoraOneCallback(TrainerCallback):
    """A callback that starts a model's LoRA by LoRA-One when training begins, from the Trainer's own data and loss.

    Attach LoRA with PEFT, make the Trainer, and add the callback to it. The start is that of `lora_one.init` on the
    first batches of the training, as one step would accumulate them. Training sees the same batches as without it. A
    run that resumes from a checkpoint, or whose lora_B is not zero, keeps its factors.

    Args:
        trainer: the Trainer, which has the data loader and the loss.
        config: the settings of the start. Default: `Config()`. The adapter's own rank, scale and targets hold.
        samples: int >= 1, default 64. How many rows of the data set the start reads, in whole batches, over all
            processes together.

    Attributes:
        report: the `Report` of the start; None before training, and if the factors were kept.

    Raises:
        ConfigError: `trainer` or `samples` is invalid.
        ModelError: when training begins: the model has no LoRA, or an optimizer is to make its start.
        BatchError: when training begins: no data.

    >>> import peft
    >>> from lora_one import demo
    >>> from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    >>> model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    >>> model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    >>> rows = [{"input_ids": list(range(4, 20)), "labels": list(range(4, 20))} for _ in range(8)]
    >>> args = TrainingArguments("out", max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True)
    >>> trainer = Trainer(model, args, train_dataset=rows)
    >>> trainer.add_callback(callback := LoraOneCallback(trainer))
    >>> _ = trainer.train()
    {'train_runtime': ...}
    >>> callback.report.batches, len(callback.report.layers)
    (1, 8)
    """

    def __init__(self, trainer: Trainer, config: Config | None = None, samples: int = 64):
        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"LoraOneCallback needs the Trainer, got a {type(trainer).__name__}: make the Trainer first, then "
                "trainer.add_callback(LoraOneCallback(trainer))"
            )
        check_integer("samples", samples, least=1)
        self.report: Report | None = None
        self._trainer = trainer
        self._config = Config() if config is None else config
        self._samples = samples

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the model, unless its factors come from a checkpoint or from an earlier training."""
        if reason := self._reason_to_keep(state):
            _LOG.info("LoRA-One keeps the factors: %s", reason)
            return
        with _random_state_kept(args.device), _metrics_kept(self._trainer):
            batches, loss_fn = self._batches_and_loss()
            _, self.report = api.init(self._trainer.model, batches, loss_fn, self._config)
        if state.is_world_process_zero:
            _LOG.info(self.report.summary())

    def _reason_to_keep(self, state: TrainerState) -> str:
        """Return why the factors stay as they are; nothing if the model is to be started."""
        if state.global_step > 0:
            return "training resumes from a checkpoint"
        model: Any = self._trainer.model
        deferred = report_of(model)
        if deferred is not None and not deferred.done:
            raise ModelError(
                "lora_one.optimizer is to make this model's start of the first training steps: leave out the callback, "
                "or init without batches and start_steps"
            )
        if adapter_of(unwrapped(model)) is None:
            raise ModelError(
                f"the Trainer's model must have LoRA before training begins, got a {type(model).__name__} without any: "
                "pass peft.get_peft_model(model, peft.LoraConfig(...)) to the Trainer, or peft_config= to trl's"
            )
        with opened(model, "LoraOneCallback") as adapted:
            started = [bool(gathered(site.lora_B.weight).any()) for site in find_sites(adapted)]
        return "lora_B is not zero, so that the adapter is started or trained already" if any(started) else ""

    def _batches_and_loss(self) -> tuple[list[Any], Any]:
        """Return this process's first batches of the training, and the Trainer's loss of one.

        The mean of the losses is the loss of one training step that accumulates all these batches.
        """
        trainer, args = self._trainer, self._trainer.args
        count = math.ceil(self._samples / (args.train_batch_size * args.world_size))
        with _new_loader(trainer) as loader:
            batches, items = trainer.get_batch_samples(iter(loader), count, args.device)
        if not batches:
            raise BatchError("the Trainer's data loader must have a batch for LoRA-One's start, got none")
        trainer.current_gradient_accumulation_steps = len(batches)
        # Such losses are their batch's part of the step's mean over all items.
        scale = len(batches) / max(1, args.n_gpu) if items is not None and _is_of_all_items(trainer) else 1.0

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                loss: Any = trainer.compute_loss(model, inputs, num_items_in_batch=items)
            return loss.mean() * scale

        return batches, loss_fn


def optimizer(args: TrainingArguments, **options: Any) -> tuple[type, dict[str, Any]]:
    """Return `lora_one.optimizer` in the form of the Trainer's argument `optimizer_cls_and_kwargs`.

    Use it for LoRA+, for the preconditioner, or to make the start of the first steps, under any engine: under FSDP the
    Trainer takes no finished optimizer. Learning rate, betas, eps and weight decay are those of the
    `TrainingArguments`. As always in the Trainer, biases and norms do not decay. The Trainer makes the schedule.

    Args:
        args: the `TrainingArguments`.
        options: arguments of `lora_one.optimizer`, such as `loraplus_lr_ratio`, `precondition` or `start_steps`; they
            come before those of `args`.

    Returns:
        The factory that the Trainer calls with its model, and the factory's arguments.

    >>> from transformers import TrainingArguments
    >>> args = TrainingArguments("out", learning_rate=1e-3, use_cpu=True)
    >>> optimizer(args, loraplus_lr_ratio=4.0)[1]["learning_rate"]
    0.001
    """
    settings = {
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return _OptimizerFactory, {**settings, **options}


class _OptimizerFactory:
    """A factory as the Trainer takes one: it makes an instance, and calls it with its model."""

    def __call__(
        self, model: nn.Module, param_groups: Iterable[dict[str, Any]] = (), **settings: Any
    ) -> torch.optim.Optimizer:
        groups = list(param_groups)
        decaying = set(Trainer.get_decay_parameter_names(None, model))  # it makes no use of `self`
        taken = {id(parameter) for group in groups for parameter in group["params"]}
        taken |= {id(factor) for pair in lora_pairs(model) for factor in pair}
        others = [p for name, p in model.named_parameters() if name not in decaying and id(p) not in taken]
        if constant := [p for p in others if p.requires_grad]:
            groups.append({"params": constant, "weight_decay": 0.0})
        with _lora_b_zero(model):
            made: torch.optim.Optimizer = api.optimizer(model, param_groups=groups, **settings)
        return made


@contextmanager
def _lora_b_zero(model: nn.Module) -> Iterator[None]:
    """Set lora_B to zero for as long as an optimizer is made that may have a start to make.

    The Trainer loads a checkpoint's factors before it makes the optimizer, and the optimizer's state after that. In its
    first step the optimizer checks that they belong together.
    """
    kept = [(pair.lora_B, pair.lora_B.detach().clone()) for pair in lora_pairs(model)]
    try:
        for lora_b, _ in kept:
            lora_b.data.zero_()
        yield
    finally:
        for lora_b, values in kept:
            lora_b.data.copy_(values)


def _is_of_all_items(trainer: Trainer) -> bool:
    """Return whether the Trainer's loss of a batch is divided by the items of all batches of its step."""
    said = getattr(trainer, "loss_is_scaled_for_ga", None)  # None: by what follows
    return bool(trainer.model_accepts_loss_kwargs or trainer.compute_loss_func) if said is None else bool(said)


@contextmanager
def _new_loader(trainer: Trainer) -> Iterator[Any]:
    """Make a data loader as that of the training, and let go of it."""
    loader: Any = trainer.get_train_dataloader()
    try:
        yield loader
    finally:
        if hasattr(loader, "end"):
            loader.end()  # accelerate's loaders do so themselves only after their last batch
        trainer.accelerator._dataloaders = [x for x in trainer.accelerator._dataloaders if x is not loader]


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def _metrics_kept(trainer: Trainer) -> Iterator[None]:
    kept = {name: copy.deepcopy(getattr(trainer, name)) for name in _METRICS if hasattr(trainer, name)}
    try:
        yield
    finally:
        vars(trainer).update(kept)
