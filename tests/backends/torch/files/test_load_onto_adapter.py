"""`load` onto a model that has an adapter: the outputs are those of the folder, and `trainable` applies."""

import peft
import pytest
import torch

import lora_one
from lora_one.errors import CheckpointError
from tests.backends.torch.files.test_files import output
from tests.backends.torch.models import llama

BASE = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
SCALES = {
    "alpha": ({"r": 2, "lora_alpha": 32}, {"r": 2, "lora_alpha": 16}),
    "rslora": ({"r": 2, "use_rslora": True}, {"r": 2}),
    "not rslora": ({"r": 2}, {"r": 2, "use_rslora": True}),
    "alpha_pattern": ({"r": 2, "alpha_pattern": {"q_proj": 30}}, {"r": 2}),
    "its own alpha_pattern": ({"r": 2}, {"r": 2, "alpha_pattern": {"q_proj": 30}}),
    "rank_pattern said otherwise": (
        {"r": 2, "rank_pattern": {"q_proj": 3}, "use_rslora": True},
        {"r": 3, "rank_pattern": {"down_proj": 2}},
    ),
}


def adapted(**settings) -> peft.PeftModel:
    torch.manual_seed(sum(map(ord, repr(settings))))
    model = llama().model
    torch.manual_seed(len(settings) + 7)
    return peft.get_peft_model(model, peft.LoraConfig(**{**BASE, **settings}))


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("writer", ["lora_one", "peft"])
def test_the_scale_is_the_folders(tmp_path, name, writer):
    theirs, ours = SCALES[name]
    source, target = adapted(**theirs), adapted(**ours)
    if writer == "peft":
        source.save_pretrained(str(tmp_path))
    else:
        lora_one.save(source, tmp_path)
    lora_one.load(target, tmp_path)
    torch.testing.assert_close(output(llama(), target), output(llama(), source), rtol=1e-6, atol=1e-6)
    lora_one.save(target, tmp_path / "again")  # and its settings say so
    again = peft.PeftModel.from_pretrained(llama().model, str(tmp_path / "again"))
    assert torch.equal(output(llama(), again), output(llama(), target))
    layer = target.base_model.model.model.layers[0].self_attn.q_proj
    layer.set_scale("default", 2.0)  # PEFT's own arithmetic goes by what it keeps of alpha
    found = again.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert layer.scaling["default"] == pytest.approx(2 * found)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("more", [{}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}])
def test_trainable_holds_whatever_was_before(tmp_path, trainable, before, more):
    model = adapted(r=2, **more)
    lora_one.save(model, tmp_path)
    for onto in (adapted(r=2, **more), llama().model):
        if isinstance(onto, peft.PeftModel):
            onto.set_adapter("default", inference_mode=not before)
        loaded = lora_one.load(onto, tmp_path, trainable)
        trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
        expected = {name for name, p in adapted(r=2, **more).named_parameters() if p.requires_grad}
        assert trained == (expected if trainable else set())


def test_init_of_an_adapter_that_was_loaded_frozen_returns_it_ready_to_train(tmp_path):
    lora_one.save(adapted(r=2), tmp_path)
    model, _ = lora_one.init(lora_one.load(llama().model, tmp_path), llama().batches)
    assert sum(p.requires_grad for p in model.parameters()) == 8
    lora_one.optimizer(model, 1e-3)


def test_an_adapter_of_which_a_part_is_frozen_stays_so():
    model = adapted(r=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_B." in name)
    model, _ = lora_one.init(model, llama().batches)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"bias": "lora_only"}, {}, "bias: the folder has 'lora_only', the model's adapter None"),
        ({}, {"bias": "all"}, "bias: the folder has None, the model's adapter 'all'"),
        (
            {"trainable_token_indices": {"embed_tokens": [5, 6]}},
            {"trainable_token_indices": {"embed_tokens": [7, 8]}},
            r"trainable_token_indices: the folder has .*\[5, 6\].*, the model's adapter .*\[7, 8\]",
        ),
        ({}, {"init_lora_weights": "pissa"}, "init_lora_weights: False in the folder and 'pissa' in the model"),
        ({"modules_to_save": ["lm_head"]}, {}, "lm_head.weight: the file has it, the model has no such module to save"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(tmp_path, theirs, ours, message):
    lora_one.save(adapted(r=2, **theirs), tmp_path)
    target = adapted(r=2, **ours)
    before = {name: p.clone() for name, p in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        lora_one.load(target, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in target.state_dict().items())


@pytest.mark.parametrize("attached", [False, True])
def test_a_load_that_fails_half_way_leaves_the_model_as_it_was(tmp_path, monkeypatch, attached):
    more = {"bias": "lora_only", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    from tests.backends.torch.models import gpt2

    source = peft.get_peft_model(gpt2().model, peft.LoraConfig(r=2, init_lora_weights=False, **more))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(parameter.requires_grad * torch.randn_like(parameter))
    lora_one.save(source, tmp_path)
    target = gpt2().model
    if attached:
        target = peft.get_peft_model(target, peft.LoraConfig(r=2, lora_alpha=3, **more))
    before = {name: p.clone() for name, p in target.state_dict().items()}
    trained = [p.requires_grad for p in target.parameters()]
    scales = [dict(m.scaling) for m in target.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict)]
    write = peft.set_peft_model_state_dict

    def fail(*args, **kwargs):
        write(*args, **kwargs)
        raise RuntimeError("no more memory")

    monkeypatch.setattr(peft, "set_peft_model_state_dict", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        lora_one.load(target, tmp_path, trainable=True)
    assert target.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in target.state_dict().items())
    assert [p.requires_grad for p in target.parameters()] == trained
    assert [dict(m.scaling) for m in target.modules() if isinstance(getattr(m, "scaling", None), dict)] == scales
