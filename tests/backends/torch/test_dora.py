"""DoRA on PyTorch: PEFT's layers, whose magnitudes start at the norms of W + s B0 A0."""

import copy
import dataclasses
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import distributed as dist

import lora_one
from lora_one.backends.torch import TorchSession, attach_plain
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.core.gradient import as_matrix
from lora_one.errors import CheckpointError, ModelError
from tests.backends.torch.deferred.runs import begun
from tests.backends.torch.deferred.test_steps import assert_steps_of_core
from tests.backends.torch.models import Case, gpt2, llama, mlp, squared_error
from tests.backends.torch.test_init import gradients
from tests.backends.torch.test_quantized import NF4, batches, load

PAGE = Path(__file__).parents[3] / "docs" / "guide" / "dora.md"
LORA = lora_one.Config(rank=4)
DORA = dataclasses.replace(LORA, dora=True)


def output(case: Case, model) -> np.ndarray:
    batch = case.batches[0]
    with torch.no_grad():
        y = model.eval()(batch[0]) if isinstance(batch, tuple) else model.eval()(**batch).logits
    return y.double().numpy()


def train(model, optimizer, case: Case, steps: int = 3) -> None:
    for i in range(steps):
        batch = case.batches[i % len(case.batches)]
        loss = model(**batch).loss if case.loss_fn is None else case.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def norms(site) -> np.ndarray:
    """The norms of the rows of W + s B A, by NumPy in float64."""
    weight = dequantize_module_weight(site.module.get_base_layer()).detach().double().numpy()
    weight = weight.T if site.module.fan_in_fan_out else weight
    a, b = (factor.weight.detach().double().numpy() for factor in (site.lora_A, site.lora_B))
    return np.linalg.norm(weight + site.layer.scaling * b @ a, axis=1)


def assert_computes_the_sum(model) -> None:
    for site in find_sites(model):
        np.testing.assert_allclose(site.magnitude.detach().double().numpy(), norms(site), rtol=1e-6)


@pytest.mark.feature("DoRA")
@pytest.mark.parametrize("make", [mlp, llama, gpt2])
@pytest.mark.parametrize("changes", [{}, {"gradient": "exact"}, {"gamma": "auto"}], ids=str)
def test_the_start_is_that_of_lora_and_the_model_computes_w_plus_s_b_a(make, changes):
    case, other = make(), make()
    lora, _ = lora_one.init(other.model, case.batches, case.loss_fn, dataclasses.replace(LORA, **changes))
    dora, report = lora_one.init(case.model, case.batches, case.loss_fn, dataclasses.replace(DORA, **changes))
    assert report.config.dora
    for one, two in zip(find_sites(lora), find_sites(dora), strict=True):
        assert torch.equal(one.lora_A.weight, two.lora_A.weight) and torch.equal(one.lora_B.weight, two.lora_B.weight)
        assert two.magnitude is not None and two.magnitude.requires_grad
    assert_computes_the_sum(dora)
    np.testing.assert_allclose(output(case, dora), output(case, lora), atol=1e-6)


@pytest.mark.parametrize("make", [mlp, llama])
def test_the_gradient_is_that_of_the_plain_weight_also_where_magnitudes_were_trained(make):
    case = make()
    expected = gradients(case)
    model = attach_plain(case.model, DORA)
    for site in find_sites(model):
        site.magnitude.data *= 1.7
    got = {}
    with TorchSession(model, case.batches, case.loss_fn, lora_one.Config()) as session:
        session.exact_pass(lambda name, g: got.update({name: as_matrix(session.ops, g).double().numpy()}))
    for name, g in got.items():
        assert np.linalg.norm(g - expected[name]) <= 1e-6 * np.linalg.norm(expected[name]), name


def test_the_preconditioner_is_for_the_factors_and_magnitudes_follow_adamw():
    case = mlp(torch.float64)
    model, _ = lora_one.init(case.model, case.batches, case.loss_fn, DORA)
    reference = copy.deepcopy(model)
    optimizer = lora_one.optimizer(model, 1e-2, precondition=True, weight_decay=0.1, loraplus_lr_ratio=4.0)
    theirs = torch.optim.AdamW([site.magnitude for site in find_sites(reference)], lr=1e-2, weight_decay=0.1)
    case.loss_fn(model, case.batches[0]).backward()
    for site, other in zip(find_sites(model), find_sites(reference), strict=True):
        other.magnitude.grad = site.magnitude.grad.clone()
        assert site.magnitude.grad.abs().max() > 0
    optimizer.step()
    theirs.step()
    for site, other in zip(find_sites(model), find_sites(reference), strict=True):
        torch.testing.assert_close(site.magnitude, other.magnitude, rtol=1e-12, atol=0)
        assert not torch.equal(site.lora_B.weight, other.lora_B.weight)


@pytest.mark.parametrize("make", [mlp, llama])
def test_a_start_without_data_renews_the_magnitudes_and_then_trains_them(make):
    dora = begun(make, torch.float64, DORA, start_steps=3)
    lora = begun(make, torch.float64, LORA, start_steps=3)
    assert_steps_of_core(dora, 1e-10)
    lora.train(0, 3)
    assert_computes_the_sum(dora.model)
    np.testing.assert_allclose(output(dora.case, dora.model), output(lora.case, lora.model), atol=1e-10)
    at_start = {site.layer.name: site.magnitude.detach().clone() for site in find_sites(dora.model)}
    dora.train(3, 4)
    for site in find_sites(dora.model):
        moved = (site.magnitude - at_start[site.layer.name]).abs()
        assert moved.max().item() == pytest.approx(1e-2, rel=1e-3)  # AdamW's first step: its moments begin here


@pytest.mark.feature("DoRA")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_saved_loaded_by_peft_and_merged_it_computes_the_same(make, tmp_path):
    case, plain = make(), make().model
    model, report = lora_one.init(case.model, case.batches, case.loss_fn, DORA)
    train(model.eval(), lora_one.optimizer(model, 1e-2), case)
    expected = output(case, model)
    lora_one.save(model, tmp_path, report)
    np.testing.assert_array_equal(output(case, lora_one.load(copy.deepcopy(plain), tmp_path)), expected)
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path))
    np.testing.assert_array_equal(output(case, by_peft), expected)
    with pytest.raises(CheckpointError, match="use_dora: the folder has True, the model's adapter False"):
        lora_one.load(attach_plain(plain, LORA), tmp_path)
    merged = lora_one.merge(model)
    np.testing.assert_allclose(output(case, merged), expected, atol=1e-6)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_an_adapter_with_dora_keeps_it_and_a_failed_start_keeps_its_values():
    model = peft.get_peft_model(mlp().model, peft.LoraConfig(r=4, target_modules=["up", "down"], use_dora=True))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def failing(model, batch):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        lora_one.init(model, mlp().batches, failing)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lora_one.init(model, mlp().batches, squared_error)
    assert_computes_the_sum(model)
    plain = peft.get_peft_model(mlp().model, peft.LoraConfig(r=4, target_modules=["up"]))
    with pytest.raises(ModelError, match=r"dora True \(the adapter's: False\)"):
        lora_one.init(plain, mlp().batches, squared_error, DORA)


def test_nf4_weights_start_train_and_start_without_data():
    model, _ = lora_one.init(load(quantization_config=NF4), batches(), config=DORA)
    assert_computes_the_sum(model)
    train(model, lora_one.optimizer(model, 1e-2), Case(model, batches(), None), 2)
    deferred, report = lora_one.init(load(quantization_config=NF4), config=DORA)
    train(deferred, lora_one.optimizer(deferred, 1e-2, start_steps=2), Case(deferred, batches(), None), 2)
    assert report.done
    assert_computes_the_sum(deferred)


def test_weights_that_are_spread_over_processes_are_refused(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="a build of PyTorch without processes")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ModelError, match="dora=True needs whole weights, since its magnitudes are norms of rows"):
            lora_one.init(fsdp.fully_shard(mlp().model), mlp().batches, squared_error, DORA)
        model, _ = lora_one.init(mlp().model, config=DORA)
        optimizer = lora_one.optimizer(model, 1e-2, start_steps=2)
        sharded = fsdp.fully_shard(model)
        with pytest.raises(ModelError, match="up: DoRA needs whole weights"):
            lora_one.init(sharded, mlp().batches, squared_error)
        with pytest.raises(ModelError, match="DoRA divides by norms of whole rows"):
            lora_one.merge(sharded)
        del optimizer
    finally:
        dist.destroy_process_group()


def test_the_example_of_the_page_runs_and_its_folder_has_the_magnitudes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    folder = lora_one.checkpoint.read_folder(tmp_path / "adapter")
    assert folder.use_dora and folder.magnitudes == {"0": (16,), "2": (4,)}
