"""The script for Lightning runs in mixed precision with clipping, and Lightning's loop is the loop written out."""

import runpy
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lora_one
from lora_one import demo
from tests.backends.torch.models import causal_batches, llama

SCRIPT = Path(__file__).parents[2] / "adapters" / "lightning" / "finetune.py"


def run(name: str) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(SCRIPT), run_name=name)


def test_script_clips_trains_and_saves_an_adapter_that_peft_opens(tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "train.jsonl", tmp_path / "adapter"
    data.write_text("\n".join(demo.TRAIN.read_text().splitlines()[:64]) + "\n")
    arguments = [
        "--data",
        str(data),
        "--steps",
        "20",
        "--batch-size",
        "8",
        "--precision",
        "bf16-mixed",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    run("__main__")
    printed = capsys.readouterr().out
    losses = [float(line.rsplit(" ", 1)[1]) for line in printed.splitlines() if line.startswith("step ")]
    assert len(losses) == 10 and losses[-1] < 0.5 * losses[0]
    assert {file.name for file in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_one.json",
    }
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    tokens = torch.arange(4, 40)[None]
    plain = base(tokens).logits
    assert (plain - PeftModel.from_pretrained(base, out)(tokens).logits).abs().max() > 0.1


def test_lightnings_loop_gives_the_factors_of_the_loop_written_out():
    import lightning

    def started() -> torch.nn.Module:
        case = llama()
        return lora_one.init(case.model, case.batches, config=lora_one.Config(rank=4))[0]

    batches = causal_batches(6)
    module = run("script")["Tuning"](started(), 1e-2)
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    trainer = lightning.Trainer(max_steps=6, accelerator="cpu", gradient_clip_val=0.5, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))

    expected = started().train()
    start = {name: parameter.detach().clone() for name, parameter in expected.named_parameters()}
    optimizer = lora_one.optimizer(expected, learning_rate=1e-2)
    for batch in batches:
        expected(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    trained = dict(module.model.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=1e-5, atol=1e-6)
        assert ("lora_" in name) == bool((parameter - start[name]).abs().max() > 1e-3)
