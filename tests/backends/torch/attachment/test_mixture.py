"""Mixtures of experts in transformers: which layers `init` uses, and what it says about the others."""

import copy

import peft
import pytest
import torch
import transformers

import lora_one
from lora_one.config import Config
from lora_one.errors import ModelError, TargetsWarning
from lora_one.estimate.architecture import lora_parameters, target_linears
from tests.estimate.models import shape_of, small

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def mixtral():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(small("mixtral"))


@pytest.fixture
def batches():
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]


def test_attention_layers_by_name_as_the_estimate_counts_them(mixtral, batches):
    model, report = lora_one.init(mixtral, batches, config=Config(rank=4, targets=ATTENTION))
    assert not report.plain_layers
    found = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert found == lora_parameters(target_linears(shape_of(mixtral.config), ATTENTION), 4)


def test_all_linear_is_what_is_linear_and_the_rest_is_named(mixtral, batches, tmp_path):
    """PEFT's own all-linear includes routers and stacked experts: nothing may be left of that first attempt."""
    plain, twin = copy.deepcopy(mixtral), copy.deepcopy(mixtral)
    named, _ = lora_one.init(twin, batches, config=Config(rank=4, targets=ATTENTION))
    stream = torch.get_rng_state()
    with pytest.warns(
        TargetsWarning, match=r"no LoRA on model.layers.\*.mlp.experts, model.layers.\*.mlp.gate: .* on 12 "
    ):
        model, report = lora_one.init(mixtral, batches, config=Config(rank=4))
    assert torch.equal(stream, torch.get_rng_state())
    assert len(report.layers) == 12 and not report.plain_layers
    want, got = dict(named.named_parameters()), dict(model.named_parameters())
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    lora_one.save(model, tmp_path, report)
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**batches[0]).logits, model.eval()(**batches[0]).logits)


def test_a_router_that_is_named_as_a_target_is_refused(mixtral, batches):
    before = {name: p.clone() for name, p in mixtral.named_parameters()}
    with pytest.raises(ModelError, match=r"mlp\.gate: LoRA on its parameter 'weight'; name linear layers"):
        lora_one.init(mixtral, batches, config=Config(rank=4, targets=(*ATTENTION, "gate")))
    after = dict(mixtral.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_gate_of_one_output_has_no_low_rank_part(batches):
    model = transformers.AutoModelForCausalLM.from_config(small("qwen2_moe"), experts_implementation="eager")
    with pytest.warns(TargetsWarning, match=r"no LoRA on model.layers.\*.mlp.shared_expert_gate: "):
        _, report = lora_one.init(model, batches, config=Config(rank=4))
    names = {layer.name.rpartition(".")[2] for layer in report.layers}
    assert names == {*ATTENTION, "gate_proj", "up_proj", "down_proj"}


@pytest.mark.filterwarnings("error::lora_one.errors.TargetsWarning")
def test_a_head_of_one_output_is_trained_and_not_missed():
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=1
    )
    batch = {"input_ids": torch.arange(3, 15).view(2, 6), "labels": torch.tensor([[0.5], [-1.0]])}
    model, report = lora_one.init(transformers.BertForSequenceClassification(config), [batch], config=Config(rank=4))
    assert len(report.layers) == 13
    assert [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name] == [
        f"base_model.model.classifier.modules_to_save.default.{side}" for side in ("weight", "bias")
    ]


def test_a_model_of_gates_alone_has_no_target():
    with pytest.raises(ModelError, match="targets must match a linear layer"):
        lora_one.init(torch.nn.Sequential(torch.nn.Linear(5, 1)), [torch.ones(2, 5)], lambda m, x: m(x).sum())
