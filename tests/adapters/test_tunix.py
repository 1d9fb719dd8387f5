"""The script for tunix's PeftTrainer, and the trainer with LoRA of qwix. For which tunix see tunix_trainer.py."""

import importlib
import re
import runpy
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import qwix
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

import lora_one
from lora_one import demo
from lora_one.checkpoint.metadata import read_report
from tests.adapters.tunix_trainer import use_stand_in

SCRIPT = Path(__file__).parents[2] / "adapters" / "tunix" / "finetune.py"


def test_script_trains_and_saves_an_adapter_that_peft_opens(tmp_path, monkeypatch, capsys):
    use_stand_in(monkeypatch)
    folder, out = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(demo.MODEL, folder)
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32", num_hidden_layers=1)
    base.save_pretrained(folder)  # one layer compiles in a quarter of the time
    arguments = ["--model", str(folder), "--steps", "20", "--batch-size", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"batch: ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < 0.8 * before
    assert read_report(out).backend == "jax"
    tokens = torch.arange(4, 40)[None]
    plain = base(tokens).logits
    assert (plain - peft.PeftModel.from_pretrained(base, out)(tokens).logits).abs().max() > 0.1


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 6, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def loss_fn(model, x, y):
    return ((model(x) - y) ** 2).mean()


def started():
    """A model to which qwix has attached LoRA, as tunix does, with LoRA-One's start, and batches for training."""
    draw = np.random.default_rng(0).standard_normal
    batches = [{"x": draw((16, 8), np.float32), "y": draw((16, 6), np.float32)} for _ in range(5)]
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0)
    model = qwix.apply_lora_to_model(Net(nnx.Rngs(0)), provider, batches[0]["x"], rngs=nnx.Rngs(1))
    model, report = lora_one.init(model, batches[:2], lambda model, batch: loss_fn(model, **batch))
    assert [(layer.name, layer.rank, layer.start) for layer in report.layers] == [
        ("down", 2, "spectral"),
        ("up", 2, "spectral"),
    ]
    return model, batches


def test_the_trainer_trains_qwixs_lora_as_a_loop_of_flax_does(monkeypatch):
    use_stand_in(monkeypatch)
    host = importlib.import_module("tunix.sft.peft_trainer")
    model, batches = started()
    config = host.TrainingConfig(eval_every_n_steps=100, max_steps=len(batches))
    host.PeftTrainer(model, lora_one.optimizer(model, 1e-2), config).with_loss_fn(loss_fn).train(batches)

    expected, _ = started()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(expected)))
    optimizer = nnx.Optimizer(expected, lora_one.optimizer(expected, 1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, **batch))

    for batch in batches:
        step(expected, optimizer, batch)

    for layer in ("up", "down"):
        got, wanted = getattr(model, layer), getattr(expected, layer)
        assert np.array_equal(got.kernel[...], before[layer]["kernel"])
        for name in ("kernel_lora_a", "kernel_lora_b"):
            np.testing.assert_allclose(getattr(got, name)[...], getattr(wanted, name)[...], rtol=1e-5, atol=1e-6)
            assert np.abs(getattr(got, name)[...] - before[layer][name]).max() > 1e-2
