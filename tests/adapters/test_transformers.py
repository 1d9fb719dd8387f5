"""The script for the Trainer, and what the Trainer asks of an optimizer."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lora_one
from lora_one import demo
from lora_one.checkpoint.metadata import read_report
from tests.backends.torch.models import causal_batches, llama

SCRIPT = Path(__file__).parents[2] / "adapters" / "transformers" / "finetune.py"


def test_script_trains_and_saves_an_adapter_that_peft_opens(tmp_path, monkeypatch, capsys):
    out = tmp_path / "adapter"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--steps", "12", "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert f"adapter: {out}" in capsys.readouterr().out
    report = read_report(out)
    assert report.batches == 8
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    tokens = torch.arange(4, 40)[None]
    plain = base(tokens, labels=tokens).logits
    adapted = PeftModel.from_pretrained(base, out)(tokens, labels=tokens).logits
    assert (plain - adapted).abs().max() > 0.1


def trainer(out, steps: int, resume: bool = False, **options) -> Trainer:
    torch.manual_seed(0)
    case = llama()
    model, _ = lora_one.init(case.model, case.batches, config=lora_one.Config(rank=4, dropout=0.1))
    rows = [{key: value[i] for key, value in batch.items()} for batch in causal_batches(4) for i in range(4)]
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=rows,
        optimizers=(lora_one.optimizer(model, 1e-2, 0.01, **options), None),
    )


@pytest.mark.parametrize("options", [{}, {"precondition": True, "reg": 1e-2}], ids=["plain", "preconditioned"])
def test_resume_in_the_trainer_is_bitwise_the_uninterrupted_run(tmp_path, options):
    """Schedule, accumulation, clipping, dropout and the optimizer's state, through the Trainer's own checkpoints."""
    whole = trainer(tmp_path / "whole", 6, **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", 6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for x, y in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(x, y)
    start = trainer(tmp_path / "start", 6, **options).model
    moved = [(x - y).abs().max() for x, y in zip(whole.model.parameters(), start.parameters(), strict=True)]
    assert max(moved) > 1e-3


def test_the_trainers_schedule_drives_every_group(tmp_path):
    run = trainer(tmp_path, 6, loraplus_lr_ratio=4.0)
    rates = []
    run.add_callback(_Watch(rates))
    run.train()
    assert all(b == pytest.approx(4 * a) for a, b in rates)
    assert rates[0][0] < rates[1][0] > rates[-1][0]


def _Watch(rates):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append(tuple(group["lr"] for group in optimizer.param_groups))

    return Watch()
