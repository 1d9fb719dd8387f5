"""4-bit base weights (bitsandbytes, on this CPU): the start is that of the dequantised weights' own gradient."""

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_one
from lora_one import demo
from lora_one.backends.torch.attachment.attach import find_sites
from tests.arrays import best_rank
from tests.backends.torch.deferred.runs import Run
from tests.backends.torch.deferred.test_steps import assert_steps_of_core
from tests.backends.torch.models import Case

RANK = 4
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def load(**options):
    return AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32, **options)


def batches():
    tokens = torch.randint(4, 90, (8, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "labels": part} for part in tokens.split(4)]


def dequantized_gradients(quantized) -> dict[str, np.ndarray]:
    """G of a float model that holds the quantised model's weights, by autograd, float64, (out, in)."""
    model = load().double()
    weights = {}
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.get_submodule(name).weight.data = weight.cpu().double()
            weights[name] = model.get_submodule(name).weight
    for batch in batches():
        model(**batch).loss.backward()
    return {name: weight.grad.numpy() / 2 for name, weight in weights.items()}


@pytest.mark.feature("Quantised base")
@pytest.mark.parametrize(
    "config",
    [lora_one.Config(rank=RANK, gradient="exact"), lora_one.Config(rank=RANK, passes=8)],
    ids=["exact", "sketch"],
)
def test_start_on_nf4_weights_is_that_of_the_dequantised_gradient(config):
    base = load(quantization_config=NF4)
    expected = dequantized_gradients(base)
    before = {name: p.data.clone() for name, p in base.named_parameters()}
    model, report = lora_one.init(base, batches(), config=config)
    assert len(report.layers) == 28
    for site in find_sites(model):
        assert isinstance(site.module, Linear4bit)
        assert torch.equal(site.module.get_base_layer().weight.data, before[f"{site.layer.name}.weight"])
        g = expected[site.layer.name]
        product = (site.lora_B.weight.double() @ site.lora_A.weight.double()).detach().numpy()
        step = -best_rank(g, RANK) / np.linalg.norm(g, 2) / 128
        assert np.linalg.norm(product - step) <= 5e-5 * np.linalg.norm(step), site.layer.name


def test_training_on_nf4_weights_steps():
    model, _ = lora_one.init(load(quantization_config=NF4), batches(), config=lora_one.Config(rank=RANK, passes=2))
    optimizer = lora_one.optimizer(model, 1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batches()[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_a_start_without_data_on_nf4_weights_is_that_of_core_and_training_goes_on():
    base = load(quantization_config=NF4)
    before = {name: p.data.clone() for name, p in base.named_parameters()}
    model, report = lora_one.init(base, config=lora_one.Config(rank=RANK))
    run = Run(model.eval(), report, lora_one.optimizer(model, 1e-2), Case(model, batches(), None))
    assert_steps_of_core(run, 5e-4)
    at_start = run.backward(0).item()
    run.optimizer.zero_grad()
    run.train(0, 5)
    assert run.backward(0).item() < at_start - 0.1
    model.state_dict()  # in which bitsandbytes undoes the other layout that it keeps weights in on some processors
    for site in find_sites(model):
        assert torch.equal(site.module.get_base_layer().weight.data, before[f"{site.layer.name}.weight"])
