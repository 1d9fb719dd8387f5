import copy
import importlib.metadata
import json
import warnings

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

import lora_one
from lora_one.checkpoint.metadata import read_report
from lora_one.errors import CheckpointError, ModelError
from tests.backends.torch.models import CASES, classifier, gpt2, llama, mlp


def trained(name: str):
    """A case, its model with an adapter after some training steps, and the report."""
    case = CASES[name]()
    model, report = lora_one.init(copy.deepcopy(case.model), case.batches, case.loss_fn, lora_one.Config(rank=4))
    optimizer = lora_one.optimizer(model, 1e-2)
    for batch in case.batches:
        loss = model(**batch).loss if case.loss_fn is None else case.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
    return case, model.eval(), report


def output(case, model) -> torch.Tensor:
    batch = case.batches[0]
    model.eval()
    with torch.no_grad():
        out = model(batch[0]) if isinstance(batch, tuple) else model(**batch)
    return out if isinstance(out, torch.Tensor) else out[1 if "loss" in out else 0]


@pytest.mark.feature("Save and load")
@pytest.mark.feature("PEFT opens the folder")
@pytest.mark.parametrize("name", CASES)
def test_saved_folder_opens_in_peft_and_here_with_equal_outputs(name, tmp_path):
    case, model, report = trained(name)
    expected = output(case, model)
    assert (expected - output(case, case.model)).abs().max() > 1e-4
    lora_one.save(model, tmp_path / "adapter", report)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(case.model), str(tmp_path / "adapter"))
    assert torch.equal(output(case, theirs), expected)
    state = torch.random.get_rng_state()
    ours = lora_one.load(copy.deepcopy(case.model), tmp_path / "adapter")
    assert torch.equal(output(case, ours), expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p.requires_grad for p in ours.parameters())
    assert read_report(tmp_path / "adapter") == report


def test_folder_has_pefts_files_and_ours(tmp_path):
    _, model, report = trained("llama")
    lora_one.save(model, tmp_path, report)
    assert {f.name for f in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "lora_one.json"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 4)
    assert (config["use_rslora"], config["lora_alpha"]) == (False, 32)  # 16 / sqrt(4) by the rule that all readers know
    written = json.loads((tmp_path / "lora_one.json").read_text())
    assert (
        written["versions"]["torch"] == importlib.metadata.version("torch") and written["report"]["config"]["rank"] == 4
    )


def test_load_on_a_model_that_has_the_adapter_already(tmp_path):
    case, model, _ = trained("llama")
    expected = output(case, model)
    lora_one.save(model, tmp_path)
    fresh, _ = lora_one.init(copy.deepcopy(case.model), case.batches, config=lora_one.Config(rank=4, seed=5))
    assert not torch.equal(output(case, fresh), expected)
    assert lora_one.load(fresh, tmp_path) is fresh
    assert torch.equal(output(case, fresh), expected)


def test_load_for_training_trains(tmp_path):
    case, model, _ = trained("mlp")
    lora_one.save(model, tmp_path)
    case.model.train()
    again = lora_one.load(case.model, tmp_path, trainable=True)
    assert again.training and sum(p.requires_grad for p in again.parameters()) == 6
    lora_one.optimizer(again)


@pytest.mark.feature("Merge")
@pytest.mark.parametrize("name", CASES)
def test_merge_is_w_plus_s_b_a_and_gives_the_plain_model_back(name):
    case, model, _ = trained(name)
    expected = output(case, model)
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    base = layer.get_base_layer().weight.detach().double().numpy().copy()
    delta = layer.scaling["default"] * (
        layer.lora_B.default.weight.detach().double().numpy() @ layer.lora_A.default.weight.detach().double().numpy()
    )
    merged = lora_one.merge(model)
    assert type(merged) is type(case.model)
    torch.testing.assert_close(output(case, merged), expected, rtol=1e-4, atol=1e-5)
    after = layer.get_base_layer().weight.detach().double().numpy()
    np.testing.assert_allclose(after, base + (delta.T if name == "gpt2" else delta), atol=1e-6)


def rewrite(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())  # not mapped: the file is written again
    safetensors.torch.save_file(change(tensors), file)


def test_everything_that_is_wrong_is_reported_at_once_and_nothing_is_loaded(tmp_path):
    case, model, _ = trained("llama")
    lora_one.save(model, tmp_path)
    prefix = "base_model.model.model.layers.0."

    def spoil(tensors):
        del tensors[prefix + "mlp.up_proj.lora_B.weight"]
        tensors[prefix + "mlp.down_proj.lora_A.weight"] = torch.zeros(4, 7)
        tensors[prefix + "self_attn.q_proj.lora_A.weight"] = torch.zeros(3, 32)
        tensors[prefix + "self_attn.z_proj.lora_A.weight"] = torch.zeros(4, 32)
        tensors[prefix + "self_attn.z_proj.lora_B.weight"] = torch.zeros(32, 4)
        tensors["strange"] = torch.zeros(1)
        return tensors

    rewrite(tmp_path, spoil)
    plain = copy.deepcopy(case.model)
    before = {name: id(module) for name, module in plain.named_modules()}
    with pytest.raises(CheckpointError) as caught:
        lora_one.load(plain, tmp_path)
    assert caught.value.problems == [
        "model.layers.0.mlp.up_proj: lora_B is missing",
        "model.layers.0.mlp.down_proj: lora_A must be (4, 48), got (4, 7)",
        "model.layers.0.self_attn.q_proj: lora_A must be (4, 32), got (3, 32)",
        "model.layers.0.self_attn.z_proj: the model has no such linear layer",
        "strange: a weight that was trained whole, and is not in modules_to_save",
    ]
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    assert {name: id(module) for name, module in plain.named_modules()} == before


def test_a_layer_that_the_file_lacks_altogether(tmp_path):
    """PEFT would train it from a random start and only warn."""
    case, model, _ = trained("llama")
    lora_one.save(model, tmp_path)
    rewrite(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k})
    plain = copy.deepcopy(case.model)
    before = [(name, id(module), sorted(vars(module))) for name, module in plain.named_modules()]
    for target in (plain, model):
        with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj: the model has LoRA here, the file has none"):
            lora_one.load(target, tmp_path)
    assert [(name, id(module), sorted(vars(module))) for name, module in plain.named_modules()] == before


def test_adapter_of_another_model(tmp_path):
    _, model, _ = trained("llama")
    lora_one.save(model, tmp_path)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        lora_one.load(gpt2().model, tmp_path)


def test_rank_pattern_is_understood(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], rank_pattern={"down": 2})
    model, _ = lora_one.init(peft.get_peft_model(mlp().model, config), mlp().batches, mlp().loss_fn)
    lora_one.save(model, tmp_path)
    again = lora_one.load(mlp().model, tmp_path)
    assert torch.equal(output(mlp(), again), output(mlp(), model))


def test_broken_folders(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"adapter_config.json: not found[\s\S]*adapter_model.safetensors: not found"
    ):
        lora_one.load(mlp().model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is not JSON"):
        lora_one.load(mlp().model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(CheckpointError, match='must be "LORA" with an integer "r", got \'IA3\''):
        lora_one.load(mlp().model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors cannot be read"):
        lora_one.load(mlp().model, tmp_path)


def test_models_without_an_adapter(tmp_path):
    for call in (lora_one.merge, lambda model: lora_one.save(model, tmp_path)):
        with pytest.raises(ModelError, match=r"needs a model with LoRA layers, as lora_one.init returns it, got Mlp"):
            call(mlp().model)


def test_a_classifiers_head_travels_with_the_adapter(tmp_path):
    case, model, _ = trained("classifier")
    lora_one.save(model, tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(key.endswith("classifier.weight") for key in keys)
    again = lora_one.load(classifier().model, tmp_path)
    assert torch.equal(output(case, again), output(case, model))


def test_lora_on_the_output_layer_travels_without_the_base_weight(tmp_path):
    case = llama()
    config = lora_one.Config(rank=2, targets=r".*(q_proj|lm_head)", passes=2, oversample=2)
    model, _ = lora_one.init(copy.deepcopy(case.model), case.batches, case.loss_fn, config)
    lora_one.save(model, tmp_path)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert any("lm_head" in name for name in names) and all(".lora_" in name for name in names)
    ours = lora_one.load(copy.deepcopy(case.model), tmp_path)
    assert torch.equal(output(case, ours), output(case, model))


@pytest.mark.parametrize("attached", [False, True])
def test_a_folder_of_pefts_with_the_output_layers_own_weight(tmp_path, attached):
    """PEFT, and so a Trainer, saves the base weight too where LoRA is on the output layer."""
    case = llama()
    config = lora_one.Config(rank=2, targets=r".*(q_proj|lm_head)", passes=2, oversample=2)
    model, _ = lora_one.init(copy.deepcopy(case.model), case.batches, case.loss_fn, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(str(tmp_path))
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    base = copy.deepcopy(case.model)
    if attached:
        base, _ = lora_one.init(base, case.batches[:1], case.loss_fn, config)
    assert torch.equal(output(case, lora_one.load(base, tmp_path)), output(case, model))
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1.0
    with pytest.raises(CheckpointError, match=rf"{key}: PEFT's copy of the base weight, which may have changed"):
        lora_one.load(other, tmp_path)


def test_reports_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="lora-one did not write it"):
        read_report(tmp_path)
    _, model, _ = trained("mlp")
    lora_one.save(model, tmp_path)
    with pytest.raises(CheckpointError, match="saved without a report"):
        read_report(tmp_path)
    (tmp_path / "lora_one.json").write_text('{"report": {"layers": 3}}')
    with pytest.raises(CheckpointError, match="not a report of lora-one"):
        read_report(tmp_path)


def test_bfloat16_adapter_of_llama(tmp_path):
    case = llama(torch.bfloat16)
    model, _ = lora_one.init(copy.deepcopy(case.model), case.batches)
    lora_one.save(model, tmp_path)
    assert torch.equal(output(case, lora_one.load(case.model, tmp_path)), output(case, model))
