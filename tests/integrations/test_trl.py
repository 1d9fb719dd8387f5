"""The callback in trl's SFTTrainer, which attaches LoRA itself, has a loss of its own, and logs what it saw."""

import numpy as np
import peft
import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lora_one import demo
from lora_one.integrations.transformers import LoraOneCallback

from .trainers import BATCH, EXACT, LORA, SAMPLES, Recorder, losses, products


class Metrics(Recorder):
    """What is to be logged already when training begins."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            self.counts = {mode: len(metrics) for mode, metrics in self.trainer._metrics.items()}


def trained(out, callback: bool, accumulated: int) -> tuple[SFTTrainer, LoraOneCallback, Metrics]:
    texts = [{"prompt": f"copy {'ab' * (i % 5 + 1)}", "completion": "ab" * (i % 3 + 1)} for i in range(32)]
    args = SFTConfig(
        str(out),
        max_steps=1,
        gradient_accumulation_steps=accumulated,
        per_device_train_batch_size=BATCH,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        str(demo.MODEL),
        args,
        train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(demo.MODEL),
        peft_config=peft.LoraConfig(**LORA),
    )
    start, metrics = LoraOneCallback(trainer, EXACT, SAMPLES), Metrics(trainer)
    for each in [start] * callback + [metrics]:
        trainer.add_callback(each)
    trainer.train()
    return trainer, start, metrics


def test_it_starts_by_the_loss_of_one_accumulated_step_and_logs_nothing_of_it(tmp_path):
    without, _, _ = trained(tmp_path, callback=False, accumulated=SAMPLES // BATCH)
    _, start, metrics = trained(tmp_path, callback=True, accumulated=1)
    assert start.report.base_loss == pytest.approx(losses(without)[0], rel=1e-5)
    assert all(np.abs(x).max() > 0 for x in products(metrics.factors).values())
    assert metrics.counts == {"train": 0, "eval": 0}
