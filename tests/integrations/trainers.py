"""A tiny Trainer whose rows have unequal numbers of labels."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from accelerate.state import GradientState
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import lora_one
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.backends.torch.attachment.sharding import gathered
from tests.backends.torch.models import causal_batches, llama

RANK = 3  # which two processes cannot share equally
STEPS, SAMPLES, BATCH = 6, 16, 4
EXACT = lora_one.Config(gradient="exact")
LORA = {"r": RANK, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def rows() -> list[dict[str, Tensor]]:
    all_rows = [{key: x[i].clone() for key, x in batch.items()} for batch in causal_batches(8) for i in range(4)]
    for i, row in enumerate(all_rows):
        row["labels"][: 1 + i % 8] = -100  # so that the gradients have a gap behind their third direction
    return all_rows


def adapted(base: Any = None, **settings: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(base or llama().model, peft.LoraConfig(**{**LORA, **settings}))


class Recorder(TrainerCallback):
    """What the model is when its training begins."""

    def on_step_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if state.global_step == 0:
            self.factors = factors(model)
            self.random_numbers = torch.get_rng_state(), np.random.get_state()[1]
            loaders = [loader for loader in GradientState().dataloader_references if loader is not None]
            self.loaders = sum(loader.dataset is train_dataloader.dataset for loader in loaders)  # not of earlier runs


class Recording(Trainer):
    """A Trainer that keeps the batches that it trains on."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.batches = [*getattr(self, "batches", []), {key: x.clone() for key, x in inputs.items()}]
        return super().training_step(model, inputs, *args, **kwargs)


def arguments(out: Path, **settings: Any) -> TrainingArguments:
    usual = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(out), **{**usual, **settings})


def factors(model: Any) -> dict[str, np.ndarray]:
    return {
        f"{site.layer.name}.{side}": gathered(getattr(site, side).weight).detach().double().numpy().copy()
        for site in find_sites(model)
        for side in ("lora_A", "lora_B")
    }


def products(pairs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return B A of each layer."""
    layers = [name.removesuffix(".lora_A") for name in pairs if name.endswith(".lora_A")]
    return {layer: pairs[f"{layer}.lora_B"] @ pairs[f"{layer}.lora_A"] for layer in layers}


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_allclose(got[key], x, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=key)
