"""`convert --to diffusers`: diffusers' own loading gives the model the outputs that PEFT gives it."""

import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner

import lora_one
from lora_one.cli import commands as cli
from lora_one.errors import CheckpointError, ConfigError


def unet() -> torch.nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )


def transformer() -> torch.nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
    )


def text_encoder() -> torch.nn.Module:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    )


def fresh(component: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return {"unet": unet, "transformer": transformer, "text_encoder": text_encoder}[component]().eval()


def output(component: str, model: torch.nn.Module) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if component == "text_encoder":
            return model(torch.tensor([[3, 17, 5, 8]])).last_hidden_state.numpy()
        sample = torch.randn(1, 2, 8, 8, generator=generator)
        text, time = torch.randn(1, 5, 12, generator=generator), torch.tensor([7])
        pooled = {"pooled_projections": torch.ones(1, 6)} if component == "transformer" else {}
        return model(sample, encoder_hidden_states=text, timestep=time, **pooled).sample.numpy()


def opened_by_diffusers(component: str, folder: Path) -> torch.nn.Module:
    """The steps of `load_lora_weights`, which wants a whole pipeline."""
    model, file = fresh(component), "pytorch_lora_weights.safetensors"
    if component == "transformer":
        tensors = SD3LoraLoaderMixin.lora_state_dict(folder, weight_name=file)
        SD3LoraLoaderMixin.load_lora_into_transformer(tensors, model)
        return model.eval()
    tensors, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(folder, weight_name=file)
    opening = getattr(StableDiffusionLoraLoaderMixin, f"load_lora_into_{component}")
    opening(tensors, alphas, model)
    return model.eval()


TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "time_emb_proj"],
    "transformer": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"],
    "text_encoder": ["q_proj", "v_proj", "fc1"],
}
# The first layers have another rank than most, by which some versions of diffusers would scale all others.
PATTERNS = {"rank_pattern": {".*q(_proj)?": 3}, "alpha_pattern": {".*v(_proj)?": 9}}


def write(component: str, folder: Path, dtype: torch.dtype = torch.float32, **settings) -> np.ndarray:
    """Save an adapter with random factors, and return the output of PEFT's model."""
    config = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": TARGETS[component]} | settings
    adapted = peft.get_peft_model(fresh(component), peft.LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = (0.3 * torch.randn_like(parameter)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return output(component, adapted.eval().float())


@pytest.mark.feature("diffusers opens it", "torch")
@pytest.mark.parametrize(
    "settings", [{}, PATTERNS, {"use_dora": True} | PATTERNS], ids=["one-scale", "scales-and-ranks", "DoRA"]
)
@pytest.mark.parametrize("component", TARGETS)
def test_diffusers_opens_the_folder_with_equal_outputs(component, settings, tmp_path):
    expected = write(component, tmp_path / "src", **settings)
    if component == "text_encoder" and "use_dora" in settings:
        with pytest.raises(CheckpointError, match="diffusers leaves DoRA's magnitudes out"):
            lora_one.convert(tmp_path / "src", tmp_path / "dst", "diffusers", component=component)
        return
    difference = np.abs(expected - output(component, fresh(component))).max()
    lora_one.convert(tmp_path / "src", tmp_path / "dst", "diffusers", component=component)
    got = output(component, opened_by_diffusers(component, tmp_path / "dst"))
    assert difference > 0.05
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * difference)


def test_a_narrow_adapter_keeps_its_values_and_the_scale_is_not_rounded(tmp_path):
    expected = write("transformer", tmp_path / "src", torch.bfloat16, use_rslora=False, lora_alpha=5)
    lora_one.convert(tmp_path / "src", tmp_path / "dst", "diffusers", component="transformer")
    kept = load_file(tmp_path / "src" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "dst" / "pytorch_lora_weights.safetensors").items():
        source = kept[name.replace("transformer.", "base_model.model.", 1)]
        if ".lora_A." in name:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, source)
        else:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, 1.25 * source.float())
    got = output("transformer", opened_by_diffusers("transformer", tmp_path / "dst"))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_the_command_names_the_component(tmp_path):
    expected = write("unet", tmp_path / "src")
    (tmp_path / "src" / "lora_one.json").write_text("{}")
    arguments = ["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--to", "diffusers", "--component", "unet"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert {file.name for file in (tmp_path / "dst").iterdir()} == {
        "lora_one.json",
        "pytorch_lora_weights.safetensors",
    }
    got = output("unet", opened_by_diffusers("unet", tmp_path / "dst"))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"to": "diffusers"}, "one of unet, transformer, text_encoder, text_encoder_2, got None"),
        ({"to": "diffusers", "component": "vae"}, "got 'vae'"),
        (
            {"to": "mlx", "component": "unet"},
            "component is for to='diffusers' alone, got component='unet' with to='mlx'",
        ),
    ],
)
def test_an_invalid_component_is_refused(arguments, reason, tmp_path):
    with pytest.raises(ConfigError) as caught:
        lora_one.convert(tmp_path / "src", tmp_path / "dst", **arguments)
    assert reason in str(caught.value)
