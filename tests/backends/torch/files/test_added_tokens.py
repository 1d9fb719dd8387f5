"""Tokens that were added to a model: their rows of the embeddings are saved with the adapter."""

import shutil

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

import lora_one
from lora_one.errors import CheckpointError
from tests.backends.torch.models import causal_batches, llama, t5

ROWS = 64  # the base model has 60
NEW = torch.tensor([[3, 60, 61, 5, 63, 62]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models with untied and with tied embeddings, and an encoder-decoder with a single embedding."""
    folder = tmp_path_factory.mktemp("bases")
    llama().model.save_pretrained(folder / "llama")
    llama(tie=True).model.save_pretrained(folder / "tied")
    t5().model.save_pretrained(folder / "t5")
    return folder


def opened(bases, name: str, rows: int | None = ROWS) -> torch.nn.Module:
    kind = T5ForConditionalGeneration if name == "t5" else AutoModelForCausalLM
    model = kind.from_pretrained(bases / name).eval()
    if rows is not None:
        torch.manual_seed(3)
        model.resize_token_embeddings(rows)
    return model


def with_rows(bases, name: str) -> torch.nn.Module:
    """A model with resized embeddings, whose new tokens are made from others, as is usual."""
    model = opened(bases, name)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight[60:] = 2 * embedding.weight[[10, 20, 30, 40]]
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=NEW, labels=NEW).logits


SETTINGS = {
    "plain": {},
    "on the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [60, 61]}},
    "whole output layer": {"modules_to_save": ["lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
}


def adapted(model: torch.nn.Module, name: str, settings: str) -> peft.PeftModel:
    torch.manual_seed(5)
    more = {"target_modules": ["q"] if name == "t5" else ["q_proj"], **SETTINGS[settings]}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **more))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" not in key:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", settings) for settings in SETTINGS]
    + [("tied", "plain"), ("tied", "on the output layer"), ("tied", "tokens"), ("t5", "plain")],
)
@pytest.mark.parametrize("writer", ["lora_one", "peft"])
def test_the_rows_come_back(bases, tmp_path, name, settings, writer):
    model = adapted(with_rows(bases, name), name, settings)
    expected = logits(model)
    if writer == "lora_one":
        lora_one.save(model, tmp_path)
    elif settings == "on the output layer" and name == "llama":
        pytest.skip("PEFT leaves the input embedding out where LoRA is on the output layer")
    else:
        model.save_pretrained(str(tmp_path))
    theirs = logits(peft.PeftModel.from_pretrained(opened(bases, name), str(tmp_path)))
    assert torch.equal(theirs, expected)
    assert torch.equal(logits(lora_one.load(opened(bases, name), tmp_path)), expected)
    onto = adapted(opened(bases, name), name, settings)
    assert not torch.equal(logits(onto), expected)
    assert torch.equal(logits(lora_one.load(onto, tmp_path)), expected)


def test_a_tied_embedding_is_written_once_and_one_that_was_not_resized_not_at_all(bases, tmp_path):
    for name, count in (("llama", 2), ("tied", 1)):
        lora_one.save(adapted(with_rows(bases, name), name, "plain"), tmp_path)
        keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
        assert sum(".lora_" not in key for key in keys) == count
        lora_one.save(adapted(opened(bases, name, None), name, "plain"), tmp_path)
        keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
        assert all(".lora_" in key for key in keys)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_base_model_that_was_not_resized_is_told_the_remedy(bases, tmp_path, settings):
    lora_one.save(adapted(with_rows(bases, "llama"), "llama", settings), tmp_path)
    plain = opened(bases, "llama", None)
    before = {name: p.clone() for name, p in plain.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"must be \(60, 32\), got \(64, 32\).*resize_token_embeddings\(64\)"):
        lora_one.load(plain, tmp_path)
    assert {name for name, _ in plain.named_modules()} == {name for name, _ in opened(bases, "llama").named_modules()}
    assert all(torch.equal(p, before[name]) for name, p in plain.state_dict().items())


def test_a_trained_token_beyond_the_model(bases, tmp_path):
    """If the folder lacks the rows, the token's number shows the problem."""
    model = adapted(with_rows(bases, "llama"), "llama", "tokens")
    model.base_model.model.name_or_path = ""
    lora_one.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"token 61 was trained, the model has 60: call.*resize_token_embeddings"):
        lora_one.load(opened(bases, "llama", None), tmp_path)


@pytest.mark.parametrize("attached", [False, True])
def test_a_load_that_fails_leaves_the_embeddings_as_they_were(bases, tmp_path, monkeypatch, attached):
    lora_one.save(adapted(with_rows(bases, "llama"), "llama", "plain"), tmp_path)
    model = opened(bases, "llama")
    if attached:
        model = adapted(model, "llama", "plain")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    write = peft.set_peft_model_state_dict

    def fail(*args, **kwargs):
        write(*args, **kwargs)
        raise RuntimeError("no more memory")

    monkeypatch.setattr(peft, "set_peft_model_state_dict", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        lora_one.load(model, tmp_path)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_base_model_that_is_gone_is_nobodys_to_compare_with(bases, tmp_path):
    shutil.copytree(bases / "llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(ROWS)
    shutil.rmtree(tmp_path / "base")
    lora_one.save(adapted(model, "llama", "plain"), tmp_path / "adapter")
    keys = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert all(".lora_" in key for key in keys)


def test_a_start_on_new_tokens_travels(bases, tmp_path):
    model, report = lora_one.init(with_rows(bases, "llama"), causal_batches(), config=lora_one.Config(rank=2, passes=2))
    lora_one.save(model, tmp_path, report)
    assert torch.equal(logits(lora_one.load(opened(bases, "llama"), tmp_path)), logits(model))
