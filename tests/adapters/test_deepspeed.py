"""The script for DeepSpeed's engine runs in two processes under ZeRO-3, and saves an adapter that PEFT opens."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_one import demo
from lora_one.checkpoint.metadata import read_report
from tests.backends.torch.spawning import free_port

ROOT = Path(__file__).parents[2]


def test_script_trains_in_two_processes_and_saves_an_adapter_that_peft_opens(tmp_path):
    data, out = tmp_path / "train.jsonl", tmp_path / "adapter"
    data.write_text("\n".join(demo.TRAIN.read_text().splitlines()[:64]) + "\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    script = ["adapters/deepspeed/finetune.py", "--data", str(data), "--steps", "10", "--out", str(out)]
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(launch + script, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"adapter: {out}" in run.stdout
    losses = [float(line.split("loss ")[1]) for line in run.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 10 and losses[-1] < 0.5 * losses[0]
    report = read_report(out)
    assert report.batches == 4  # two in each process
    assert all(layer.start == "spectral" for layer in report.layers) and len(report.layers) == 28
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    tokens = torch.arange(4, 40)[None]
    plain = base(tokens).logits
    assert (plain - PeftModel.from_pretrained(base, out)(tokens).logits).abs().max() > 0.1
