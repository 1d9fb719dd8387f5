"""The scripts for TRL's SFTTrainer and DPOTrainer run and save an adapter that PEFT opens; DPO's reference policy."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one import demo
from lora_one.checkpoint.metadata import read_report

SCRIPT = Path(__file__).parents[2] / "adapters" / "trl" / "finetune.py"
DPO = SCRIPT.with_name("dpo.py")
ROWS = [{"prompt": f"copy {x}{y}=", "chosen": f"{x}{y}", "rejected": f"{y}{x}"} for x in "abcdefgh" for y in "mnop"]


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


@pytest.fixture
def preferences(tmp_path) -> Path:
    file = tmp_path / "preferences.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run_dpo(preferences: Path, out: Path, monkeypatch, capsys, *arguments: str) -> list[dict[str, float]]:
    """Run the script and return what it logged."""
    monkeypatch.setattr(sys, "argv", [str(DPO), "--data", str(preferences), "--out", str(out), *arguments])
    runpy.run_path(str(DPO), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    return [{key: float(value) for key, value in re.findall(r"'([^']+)': '([^']+)'", line)} for line in lines]


def log_probabilities(model, key: str) -> torch.Tensor:
    """Return the log-probability of each row's answer, end of sequence included; row by row, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    sums = []
    for row in ROWS:
        prompt, answer = tokenizer.encode(row["prompt"]), tokenizer.encode(row[key] + tokenizer.eos_token)
        with torch.no_grad():
            every = model(torch.tensor([prompt + answer])).logits.double().log_softmax(-1)[0]
        sums.append(sum(every[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))
    return torch.stack(sums)


@pytest.mark.parametrize("reference", ["base", "start"])
def test_dpos_reference_policy_is_the_base_or_base_and_start(reference, preferences, tmp_path, monkeypatch, capsys):
    """At learning rate 0 the saved adapter is the start, and the one batch has all rows."""
    out = tmp_path / "adapter"
    arguments = ["--reference", reference, "--steps", "1", "--learning-rate", "0"]
    (logged,) = run_dpo(preferences, out, monkeypatch, capsys, *arguments)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    of_base = log_probabilities(model, "chosen") - log_probabilities(model, "rejected")
    started = PeftModel.from_pretrained(model, out)
    margins = 0.1 * (log_probabilities(started, "chosen") - log_probabilities(started, "rejected") - of_base)
    assert margins.abs().max() > 0.1
    if reference == "start":
        assert logged["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert logged["rewards/margins"] == 0
    else:
        assert logged["loss"] < math.log(2)
        assert logged["loss"] == pytest.approx(torch.nn.functional.softplus(-margins).mean().item(), rel=1e-3)
        assert logged["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-3)
        assert read_report(out).base_loss == pytest.approx(math.log(2), rel=1e-6)  # the start's gradient is DPO's own


def test_dpo_trains_and_saves_the_policy(preferences, tmp_path, monkeypatch, capsys):
    out = tmp_path / "adapter"
    logged = run_dpo(preferences, out, monkeypatch, capsys, "--steps", "6")
    assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    before = log_probabilities(base, "chosen") - log_probabilities(base, "rejected")
    policy = PeftModel.from_pretrained(base, out)
    margins = 0.1 * (log_probabilities(policy, "chosen") - log_probabilities(policy, "rejected") - before)
    assert margins.mean() > logged[-1]["rewards/margins"] > logged[0]["rewards/margins"]
