"""The script for diffusers trains a UNet, and a pipeline opens what it wrote at the right scale."""

import runpy
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

import lora_one

SCRIPT = Path(__file__).parents[2] / "adapters" / "diffusers" / "finetune.py"


def noise(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 12, generator=generator)
    with torch.no_grad():
        return unet.eval()(sample, torch.tensor([3, 400, 900]), encoder_hidden_states=text).sample


def pipeline(unet: torch.nn.Module) -> StableDiffusionPipeline:
    """A pipeline of which only the UNet is there."""
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDPMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **others)


def test_a_pipeline_opens_the_trained_adapter_with_the_outputs_of_the_trained_model(tmp_path, monkeypatch, capsys):
    script = runpy.run_path(str(SCRIPT))
    torch.manual_seed(0)
    base = script["tiny_unet"]()
    base.save_pretrained(tmp_path / "base" / "unet")
    save_file(script["tiny_data"](), tmp_path / "data.safetensors")
    given = ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "data.safetensors")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, "--steps", "40", "--out", str(tmp_path / "out")])
    (tmp_path / "out" / "diffusers").mkdir(parents=True)
    (tmp_path / "out" / "diffusers" / "left.txt").write_text("by an earlier run")
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(line.rsplit(" ", 1)[1]) for line in printed.splitlines() if line.startswith("step ")]
    assert len(losses) == 10 and sum(losses[-3:]) < 0.9 * sum(losses[:3])

    before = noise(base)
    pipe = pipeline(base)
    pipe.load_lora_weights(tmp_path / "out" / "diffusers", weight_name="pytorch_lora_weights.safetensors")
    opened = noise(pipe.unet)
    pipe.unload_lora_weights()
    assert torch.equal(noise(pipe.unet), before)
    expected = noise(lora_one.load(pipe.unet, tmp_path / "out" / "peft"))
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(opened, expected, rtol=0, atol=1e-5)
