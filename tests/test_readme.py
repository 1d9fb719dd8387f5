"""The README: its examples run as they are printed, and it stays short."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import mlx.nn as nn
import pytest
from mlx_lm.tuner.trainer import iterate_batches
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lora_one
from lora_one import demo
from lora_one.backends.mlx import load_pretrained

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTORCH, WITHOUT_BATCHES, JAX, MLX = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example in an empty folder, and return what it prints and its names."""

    def execute(code: str) -> tuple[str, dict]:
        monkeypatch.chdir(tmp_path)
        scope: dict = {}
        exec(compile(code, "README.md", "exec"), scope)
        return capsys.readouterr().out, scope

    return execute


def loss(printed: str) -> float:
    return float(re.search(r"^loss (\S+)$", printed, flags=re.MULTILINE)[1])


def test_pytorch_and_jax_come_to_the_same_loss_and_peft_opens_the_adapter(run, tmp_path):
    printed, scope = run(PYTORCH)
    assert "LoRA-One (torch, sketch): 28 layers, 1 pass over 4 batches" in printed
    assert loss(printed) < 4 < 14 < scope["report"].base_loss
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert abs(opened(**scope["batch"]).loss.item() - scope["model"](**scope["batch"]).loss.item()) < 1e-5

    printed, _ = run(JAX)
    assert "LoRA-One (jax, sketch): 28 layers, 1 pass over 4 batches" in printed
    assert abs(loss(printed) - scope["loss"].item()) < 0.01  # 38 steps in float32, printed with two digits


def test_without_batches_the_optimizer_makes_the_start(run):
    _, scope = run(WITHOUT_BATCHES)
    assert scope["report"].done and scope["report"].steps == 6
    assert {layer.start for layer in scope["report"].layers} == {"spectral"} and len(scope["report"].layers) == 28


def test_mlx(run, tmp_path):
    _, scope = run(MLX)
    assert len(scope["report"].layers) == 28 and scope["report"].base_loss > 14
    tokens, _ = next(iterate_batches(scope["rows"], 32, 32))
    opened = lora_one.load(load_pretrained(demo.MODEL)[0], tmp_path / "adapter")
    after = nn.losses.cross_entropy(opened(tokens)[:, :-1], tokens[:, 1:], reduction="mean").item()
    assert after < 0.4 * scope["report"].base_loss


def test_the_command(tmp_path):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
    [block] = [block for language, block in blocks if not language and "lora-one" in block]
    printed = []
    for line in block.splitlines():
        name, *arguments = shlex.split(line, comments=True)
        assert name == "lora-one"
        command = [sys.executable, "-m", "lora_one", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert "Exact match after training" in printed[0] and "runs/mine" in printed[0]
    assert "q_proj" in printed[1]


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 120
    assert len(TEXT.split()) <= 700
    assert "pip install" in "\n".join(TEXT.splitlines()[:12])
