"""Merging changes the layers that have LoRA, and no other module that shares a weight with them."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel, BertForMaskedLM, LlamaForCausalLM

import lora_one
from lora_one.errors import ModelError
from tests.backends.torch.models import bert_config, gpt2, llama, t5, tokens


def masked() -> nn.Module:
    torch.manual_seed(0)
    model = BertForMaskedLM(bert_config())
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    return model


TIED = {
    "llama": (lambda: llama(tie=True).model, ["lm_head", "q_proj"]),
    "gpt2": (lambda: gpt2().model, ["lm_head", "c_attn"]),
    "t5": (lambda: t5().model, ["lm_head", "q"]),
    "bert": (masked, ["decoder", "query"]),
}


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens(1), labels=tokens(1)).logits


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TIED)
def test_a_tied_output_layer_is_parted_from_the_embedding(name, tmp_path):
    make, targets = TIED[name]
    base = make()
    before = base.get_input_embeddings().weight.detach().clone()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    expected = logits(model)
    merged = lora_one.merge(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert not torch.equal(merged.get_output_embeddings().weight, before)
    merged.save_pretrained(tmp_path)
    again, found = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits(again), logits(merged))
    again.tie_weights()  # as resizing the embeddings does
    assert name == "t5" or torch.equal(logits(again), logits(merged))


def test_a_tied_model_without_lora_on_its_output_layer_stays_tied():
    model = peft.get_peft_model(llama(tie=True).model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    merged = lora_one.merge(model)
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight


class ScaledByTheTie(LlamaForCausalLM):
    """A model that scales by the tie, as T5 did, and Switch Transformers do."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return out if self.config.tie_word_embeddings else None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_computes_by_the_tie_is_refused_as_it_was():
    base = ScaledByTheTie(llama(tie=True).model.config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"part lm_head from the weight it is tied to, and a ScaledByTheTie without"):
        lora_one.merge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert base.lm_head.get_base_layer().weight is base.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merge_that_fails_leaves_the_tie(monkeypatch):
    model = peft.get_peft_model(llama(tie=True).model, peft.LoraConfig(r=2, target_modules=["lm_head"]))

    def fail(*args, **kwargs):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(type(model.base_model), "merge_and_unload", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        lora_one.merge(model)
    base = model.get_base_model()
    assert base.lm_head.get_base_layer().weight is base.model.embed_tokens.weight and base.config.tie_word_embeddings


class Twins(nn.Module):
    """Two layers with the same weight, and one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.called = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(torch.tanh(self.two(torch.tanh(self.called(torch.tanh(self.one(x)))))))


@pytest.mark.parametrize("targets", [["one"], ["one", "two"], ["called"]])
def test_layers_that_share_a_weight_each_get_their_own_delta(targets):
    torch.manual_seed(0)
    base, x = Twins(), torch.randn(4, 6)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=targets,
                                                                    init_lora_weights=False))  # fmt: skip
    expected = model.eval()(x)
    merged = lora_one.merge(model)
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-6)
    for name in {"one", "two", "called"} - set(targets):
        assert torch.equal(getattr(merged, name).weight, getattr(base, name).weight)


class TwoNames(nn.Module):
    """One layer under two names; PEFT adapts the first."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def test_a_layer_of_two_names_is_parted():
    torch.manual_seed(0)
    base, x = TwoNames(), torch.randn(4, 6)
    weight = base.one.weight.detach().clone()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["one"], init_lora_weights=False))
    expected = model.eval()(x)
    merged = lora_one.merge(model)
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged.two.weight, weight) and not torch.equal(merged.one.weight, weight)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_whole_embedding_that_was_trained_is_parted_from_the_output_layer(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(llama(tie=True).model, config)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.modules_to_save.default.weight.add_(1.0)
    expected = logits(model)
    merged = lora_one.merge(model)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": {"lm_head": [4]}}, "into a weight that another module shares, without these"),
        ({"trainable_token_indices": {"lm_head": [4], "embed_tokens": [5]}}, "into a weight that another module"),
        ({"trainable_token_indices": [4], "target_modules": ["lm_head"]}, "either LoRA or trained tokens of one layer"),
    ],
)
def test_trained_tokens_of_one_of_two_tied_layers_are_refused(settings, message):
    model = peft.get_peft_model(
        llama(tie=True).model, peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], **settings})
    )
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        lora_one.merge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trained_tokens_of_both_tied_layers_stay_tied():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4], init_lora_weights=False)
    model = peft.get_peft_model(llama(tie=True).model, config)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.token_adapter.trainable_tokens_delta.default.add_(1.0)
    expected = logits(model)
    merged = lora_one.merge(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings


def test_layers_that_are_one_module_stay_one():
    """ALBERT runs one block many times: its weight is not shared, it is the same."""
    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=60, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                          num_attention_heads=4, max_position_embeddings=32)  # fmt: skip
    model = peft.get_peft_model(AlbertModel(config), peft.LoraConfig(r=2, target_modules=["query"],
                                                                     init_lora_weights=False))  # fmt: skip
    model.eval()
    expected = model(input_ids=tokens(1)).last_hidden_state
    count = sum(p.numel() for p in AlbertModel(config).parameters())
    merged = lora_one.merge(model)
    torch.testing.assert_close(merged(input_ids=tokens(1)).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in merged.parameters()) == count


def test_layers_that_were_replicated_each_get_their_own_delta():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]],
                             init_lora_weights=False)  # fmt: skip
    model = peft.get_peft_model(llama().model, config)
    expected = logits(model)
    torch.testing.assert_close(logits(lora_one.merge(model)), expected, rtol=1e-4, atol=1e-5)
