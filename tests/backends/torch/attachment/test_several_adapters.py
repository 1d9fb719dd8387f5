"""Models with more than one adapter, or one that is not called "default": the active one is what is saved."""

import json

import peft
import pytest
import safetensors.torch
import torch

import lora_one
from lora_one.errors import ModelError
from tests.backends.torch.files.test_files import output
from tests.backends.torch.models import llama

SECOND = peft.LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj"], init_lora_weights=False)


def first_and(second: peft.LoraConfig, **first):
    config = peft.LoraConfig(r=2, target_modules=["v_proj", "up_proj"], init_lora_weights=False, **first)
    model = peft.get_peft_model(llama().model, config)
    model.add_adapter("second", second)
    model.set_adapter("second")
    return model


def opened(folder) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of the folder's adapter, opened by PEFT and by us."""
    return tuple(
        output(llama(), model)
        for model in (
            peft.PeftModel.from_pretrained(llama().model, str(folder)),
            lora_one.load(llama().model, folder),
        )
    )


def test_the_active_adapter_goes_to_the_folders_top_alone(tmp_path):
    model = first_and(SECOND)
    model, report = lora_one.init(model, llama().batches)
    lora_one.save(model, tmp_path, report)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_one.json",
    }
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert len(keys) == 4 and all(".q_proj.lora_" in key for key in keys)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    for found in opened(tmp_path):
        assert torch.equal(found, output(llama(), model))


def test_an_adapter_of_another_name_alone(tmp_path):
    model = peft.get_peft_model(llama().model, SECOND, adapter_name="mine")
    lora_one.save(model, tmp_path)
    for found in opened(tmp_path):
        assert torch.equal(found, output(llama(), model))


@pytest.mark.parametrize(
    "more", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [5, 6]}}]
)
@pytest.mark.parametrize("of_the_active", [False, True])
def test_what_another_adapter_trains_beside_lora_stays_out(tmp_path, more, of_the_active):
    one, two = ({}, more) if of_the_active else (more, {})
    model = first_and(peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, **two), **one)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    lora_one.save(model, tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(".lora_" not in key for key in keys) == of_the_active
    for found in opened(tmp_path):
        assert torch.equal(found, output(llama(), model))


def test_two_active_adapters_have_no_folder(tmp_path):
    model = first_and(SECOND)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match=r"save takes one active adapter, got \['default', 'second'\]: choose with"):
        lora_one.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_named_as_a_module_is_refused_where_pefts_names_would_mix(tmp_path):
    """PEFT leaves out all keys that contain ".layers.": it believes they belong to the other adapter."""
    model = first_and(SECOND)
    model.add_adapter("layers", SECOND)
    with pytest.raises(ModelError, match=r"no adapter may be named as a module of the model is, got .*'layers'"):
        lora_one.save(model, tmp_path)


def test_load_onto_a_model_fills_the_active_adapter_and_leaves_the_other(tmp_path):
    source = peft.get_peft_model(llama().model, SECOND)
    lora_one.save(source, tmp_path)
    model = first_and(SECOND)
    first = {name: p.clone() for name, p in model.named_parameters() if ".default." in name}
    assert lora_one.load(model, tmp_path) is model
    assert torch.equal(output(llama(), model), output(llama(), source))
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in first.items())
