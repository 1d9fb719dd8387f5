"""The script for Flax runs, lowers the loss, and saves an adapter that PEFT opens."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_one import demo
from lora_one.checkpoint.metadata import read_report
from lora_one.report.deferred import DeferredReport

SCRIPT = Path(__file__).parents[2] / "adapters" / "flax" / "finetune.py"


@pytest.mark.parametrize("form", [[], ["--deferred"]], ids=["from batches", "deferred"])
def test_script_trains_and_saves_an_adapter_that_peft_opens(form, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "train.jsonl", tmp_path / "adapter"
    data.write_text("\n".join(demo.TRAIN.read_text().splitlines()[:64]) + "\n")
    arguments = ["--data", str(data), "--steps", "20", "--batch-size", "16", "--out", str(out), *form]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"adapter: {out}" in printed
    losses = [float(line.rsplit(" ", 1)[1]) for line in printed.splitlines() if line.startswith("step ")]
    assert losses[-1] < 0.7 * losses[0]
    report = read_report(out)
    assert report.backend == "jax"
    assert ("started from the gradients of the first" in printed) == isinstance(report, DeferredReport) == bool(form)
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    tokens = torch.arange(4, 40)[None]
    plain = base(tokens).logits
    assert (plain - PeftModel.from_pretrained(base, out)(tokens).logits).abs().max() > 0.1
