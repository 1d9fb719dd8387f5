"""The folder of every possible training opens again: every setting of PEFT that `init` accepts."""

import copy

import peft
import pytest
import torch

import lora_one
from lora_one.errors import CheckpointError
from tests.backends.torch.files.test_files import output
from tests.backends.torch.models import causal_batches, llama


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(llama().model.config)
    config.attention_bias = True
    return type(llama().model)(config)


KINDS = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 6]}},
    "tokens in a list": {"trainable_token_indices": [5, 6]},
    "lora_only": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "whole modules": {"modules_to_save": ["lm_head", "norm"]},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "k_proj"]},
    "expression": {"target_modules": r".*1\.(mlp\.up_proj|self_attn\.q_proj)"},
    "replicated": {"layer_replication": [[0, 2], [1, 2]]},
    "all at once": {"bias": "lora_only", "modules_to_save": ["lm_head"], "trainable_token_indices": [5]},
}


def trained(**settings) -> peft.PeftModel:
    config = peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"], **settings})
    model, _ = lora_one.init(peft.get_peft_model(base(), config), causal_batches(), config=lora_one.Config(passes=2))
    optimizer = lora_one.optimizer(model, learning_rate=1e-2)
    for batch in causal_batches():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_was_trained_opens_in_peft_and_here(tmp_path, kind):
    model = trained(**KINDS[kind])
    expected = output(llama(), model)
    lora_one.save(model, tmp_path)
    theirs = output(llama(), peft.PeftModel.from_pretrained(base(), str(tmp_path)))
    torch.testing.assert_close(theirs, expected, rtol=1e-6, atol=1e-6)
    fresh = lora_one.load(base(), tmp_path)
    assert torch.equal(output(llama(), fresh), theirs)
    config = peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"], **KINDS[kind]})
    onto = lora_one.load(peft.get_peft_model(base(), config), tmp_path)
    assert torch.equal(output(llama(), onto), theirs)


@pytest.mark.parametrize("kind", ["tokens", "lora_only", "replicated", "whole modules"])
def test_what_is_missing_or_misshapen_is_told_and_nothing_stays(tmp_path, kind):
    lora_one.save(trained(**KINDS[kind]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    from safetensors.torch import load, save_file

    tensors = load(file.read_bytes())  # not mapped: the file is written again
    key = next((key for key in tensors if ".lora_" not in key), "base_model.model.model.layers.2.self_attn.q_proj")
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(key)}
    plain = base()
    before = {name: p.clone() for name, p in plain.state_dict().items()}
    layers = plain.config.num_hidden_layers
    save_file(rest, file)
    problem = "the model has LoRA here, the file has none" if kind == "replicated" else "the file has none"
    with pytest.raises(CheckpointError, match=problem):
        lora_one.load(plain, tmp_path)
    if kind != "replicated":
        save_file({**rest, key: torch.zeros(7, 7)}, file)
        with pytest.raises(CheckpointError, match=r"must be \(.*\), got \(7, 7\)"):
            lora_one.load(plain, tmp_path)
    assert plain.state_dict().keys() == before.keys() and plain.config.num_hidden_layers == layers
    assert all(torch.equal(p, before[name]) for name, p in plain.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_bias": True, "init_lora_weights": True}, "a bias of LoRA's own"),
    ],
)
def test_what_init_does_not_start_load_does_not_open(tmp_path, settings, reason):
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **settings})
    peft.get_peft_model(base(), config).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=reason):
        lora_one.load(base(), tmp_path)


def test_settings_that_peft_cannot_use_are_a_checkpoint_error(tmp_path):
    lora_one.save(peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj"])), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    for old, new in (
        ('"lora_alpha": 8', '"lora_alpha": "much"'),
        ('"bias": "none"', '"bias": "some"'),
        ('"q_proj"', '"z_proj"'),
        ('"rank_pattern": {}', '"rank_pattern": {"((": 2}'),
        ('"rank_pattern": {}', '"rank_pattern": [1]'),
        ('"trainable_token_indices": null', '"trainable_token_indices": {"embed_tokens": 5}'),
        ('"trainable_token_indices": null', '"trainable_token_indices": [null]'),
    ):
        assert old in text
        (tmp_path / "adapter_config.json").write_text(text.replace(old, new))
        plain = base()
        with pytest.raises(CheckpointError, match=r"its settings cannot be used|PEFT cannot attach|does not fit"):
            lora_one.load(plain, tmp_path)
        assert not any("lora" in name for name, _ in plain.named_modules())
