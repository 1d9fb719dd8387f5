"""Mixtures of experts in transformers: which layers `init` takes, and what it says of the others."""

import pytest
import torch
import transformers

import lora_one
from lora_one.config import Config
from lora_one.errors import ModelError
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


def test_a_router_or_experts_that_peft_would_adapt_are_named(mixtral, batches):
    before = {name: p.clone() for name, p in mixtral.named_parameters()}
    with pytest.raises(ModelError, match=r"mlp\.gate: LoRA on its parameter 'weight'; name linear layers") as error:
        lora_one.init(mixtral, batches, config=Config(rank=4))
    assert "mlp.experts: LoRA on its parameter 'down_proj'" in str(error.value)
    after = dict(mixtral.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
