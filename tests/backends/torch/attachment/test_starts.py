"""Adapters whose start moved a part of the base weights into the factors, such as PiSSA."""

import json
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga

import lora_one
from lora_one.errors import CheckpointError, ModelError
from tests.backends.torch.models import llama


def adapted(start, model=None) -> torch.nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's of EVA without data
        return peft.get_peft_model(llama().model if model is None else model, config)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**llama().batches[0]).logits


def lora_ga() -> torch.nn.Module:
    model = llama().model
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, config, lambda: model(**llama().batches[0]).loss.backward())
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "lora_ga"])
def test_a_start_that_changed_the_base_weights_is_refused(start):
    model = lora_ga() if start == "lora_ga" else adapted(start)
    before = logits(model)
    message = rf"init_lora_weights='{start}', changed the base weights.* open the base model anew"
    for each in (model, model.base_model.model):  # and as injected layers
        with pytest.raises(ModelError, match=message):
            lora_one.init(each, llama().batches)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_keep_the_base_weights_are_started_again(start):
    model, _ = lora_one.init(adapted(start), llama().batches, config=lora_one.Config(gamma=1e9))
    torch.testing.assert_close(logits(model), logits(llama().model))


@pytest.mark.parametrize("start", ["loftq", "corda", "one_of_tomorrow"])
def test_starts_that_need_data_or_a_gpu_or_are_not_known(start):
    """Their name is enough to refuse them."""
    model = adapted(True)
    model.peft_config["default"].init_lora_weights = start
    with pytest.raises(ModelError, match=f"init_lora_weights='{start}', changed the base weights"):
        lora_one.init(model, llama().batches)


def test_another_adapter_that_changed_them_counts_too():
    model = adapted("pissa")
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("second")
    with pytest.raises(ModelError, match="adapter 'default'"):
        lora_one.init(model, llama().batches)


def trained(start) -> torch.nn.Module:
    model = adapted(start).train()
    adamw = lora_one.optimizer(model, learning_rate=1e-2)
    model(**llama().batches[0]).loss.backward()
    adamw.step()
    return model


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_peft_can_repeat_is_saved_loaded_and_merged(start, tmp_path):
    model = trained(start)
    expected = logits(model)
    lora_one.save(model, tmp_path)
    opened = lora_one.load(llama().model, tmp_path)
    torch.testing.assert_close(logits(opened), expected, rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="changed the base weights"):
        lora_one.init(opened, llama().batches)
    base = opened.base_model.model
    with pytest.raises(ModelError, match="changed the base weights"):
        lora_one.load(base, tmp_path)  # handed in again: its weights are no longer the base model's
    torch.testing.assert_close(logits(opened), expected, rtol=0, atol=1e-5)
    again = adapted(start)
    torch.testing.assert_close(logits(lora_one.load(again, tmp_path)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(lora_one.merge(model)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga"])
def test_a_folder_whose_start_cannot_be_repeated_is_refused(start, tmp_path):
    lora_one.save(trained("pissa"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
    model = llama().model
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{start}': .* cannot be made again from this folder"):
        lora_one.load(model, tmp_path)
    assert torch.equal(logits(model), logits(llama().model))


def test_what_peft_cannot_open_is_our_error(tmp_path):
    """LoftQ's own start runs on CUDA only."""
    lora_one.save(trained(True), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    more = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3, "loftq_iter": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **more}))
    model = llama().model
    with pytest.raises(CheckpointError, match="PEFT cannot attach the adapter in "):
        lora_one.load(model, tmp_path)
    assert torch.equal(logits(model), logits(llama().model))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_factors_do_not_go_with_base_weights_of_another_start(tmp_path):
    lora_one.save(trained(True), tmp_path / "plain")
    lora_one.save(trained("pissa"), tmp_path / "pissa")
    for start, folder in (("pissa", "plain"), (True, "pissa"), ("olora", "pissa")):
        model = adapted(start)
        before = logits(model)
        with pytest.raises(CheckpointError, match="whose base weights are therefore not the same"):
            lora_one.load(model, tmp_path / folder)
        assert torch.equal(logits(model), before)
    expected = logits(lora_one.load(llama().model, tmp_path / "plain"))
    assert torch.equal(logits(lora_one.load(adapted("gaussian"), tmp_path / "plain")), expected)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_load_that_fails_late_puts_the_base_weights_back(start, tmp_path):
    """PEFT had changed them in place."""
    lora_one.save(trained(start), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"].append("up_proj")  # of which the file has no factors
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = llama().model
    with pytest.raises(CheckpointError, match="up_proj: the model has LoRA here, the file has none"):
        lora_one.load(model, tmp_path)
    assert torch.equal(logits(model), logits(llama().model))


def test_a_difference_to_the_start_is_plain_lora(tmp_path):
    """The refusals name this function of PEFT as the way to move such an adapter."""
    model = adapted("pissa")
    model.save_pretrained(tmp_path / "start")
    adamw = lora_one.optimizer(model.train(), learning_rate=1e-2)
    model(**llama().batches[0]).loss.backward()
    adamw.step()
    expected = logits(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    opened = lora_one.load(llama().model, tmp_path / "plain")
    torch.testing.assert_close(logits(opened), expected, rtol=0, atol=1e-5)
    lora_one.init(opened, llama().batches, config=lora_one.Config(gradient="exact"))
