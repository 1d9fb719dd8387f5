"""The script for TRL's SFTTrainer runs, makes its start of the first steps, and saves an adapter that PEFT opens."""

import runpy
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_one import demo
from lora_one.checkpoint.metadata import read_report

SCRIPT = Path(__file__).parents[2] / "adapters" / "trl" / "finetune.py"


def test_script_makes_the_start_while_it_trains_and_saves_an_adapter_that_peft_opens(tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "train.jsonl", tmp_path / "adapter"
    data.write_text("\n".join(demo.TRAIN.read_text().splitlines()[:64]) + "\n")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--data", str(data), "--steps", "20", "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"adapter: {out}" in printed
    losses = [float(line.split("'loss': '")[1].split("'")[0]) for line in printed.splitlines() if "'loss'" in line]
    assert losses[-1] < 0.5 * losses[0]
    report = read_report(out)
    assert report.done and report.start_steps == "auto" and 6 <= report.steps <= 16
    assert all(layer.start == "spectral" for layer in report.layers) and len(report.layers) == 28
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    tokens = torch.arange(4, 40)[None]
    plain = base(tokens).logits
    assert (plain - PeftModel.from_pretrained(base, out)(tokens).logits).abs().max() > 0.1
