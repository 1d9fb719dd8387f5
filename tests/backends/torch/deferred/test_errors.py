"""What the start refuses, with nothing changed, and what is saved before it is made."""

import gc

import peft
import pytest
import torch
from torch import nn

import lora_one
from lora_one.backends.torch import LoraOneAdamW
from lora_one.backends.torch.pairs import LoraPair
from lora_one.errors import AdapterWarning, ConfigError, ModelError, UnfinishedStartWarning
from tests.backends.torch.deferred.runs import CONFIG, begun, same
from tests.backends.torch.models import llama, mlp


@pytest.fixture
def sharding():
    """A process group of one, and what shards a tensor over it."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda x: distribute_tensor(x.detach(), mesh, [Shard(0)])
    distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{"start_steps": 2}, {"precondition": True, "start_steps": 0}])
def test_parameters_that_are_exchanged_for_sharded_ones_go_on(sharding, options):
    """As accelerate exchanges them: each in its place, without a word to the optimizer."""
    run, whole = begun(**options), begun(**options)
    for group in run.optimizer.param_groups:
        group["params"] = [nn.Parameter(sharding(p)) for p in group["params"]]
    sharded = [p for group in run.optimizer.param_groups for p in group["params"]]
    for batch in (0, 1, 2):
        for got, p in zip(sharded, (p for group in whole.optimizer.param_groups for p in group["params"]), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(batch))
            got.grad = sharding(p.grad)
        run.optimizer.step()
        whole.optimizer.step()
    for got, p in zip(sharded, (p for group in whole.optimizer.param_groups for p in group["params"]), strict=True):
        torch.testing.assert_close(got.full_tensor(), p.detach(), rtol=1e-6, atol=1e-7)


def attached(**options) -> peft.PeftModel:
    return peft.get_peft_model(mlp().model, peft.LoraConfig(r=4, target_modules=["up", "down"], **options))


def nonzero(model) -> peft.PeftModel:
    nn.init.ones_(model.base_model.model.down.lora_B.default.weight)
    return model


def frozen(model) -> peft.PeftModel:
    model.base_model.model.down.lora_A.default.weight.requires_grad_(False)
    return model


def inactive(model) -> peft.PeftModel:
    model.base_model.disable_adapter_layers()
    model.requires_grad_(True)
    return model


REFUSED = {
    "a number": (attached, -1, ConfigError, 'start_steps must be an integer >= 0 or "auto", got -1'),
    "a word": (attached, "all", ConfigError, "got 'all'"),
    "a B that is not zero": (lambda: nonzero(attached()), 6, ModelError, "B = 0, got another B in 1 layers: down"),
    "no LoRA": (lambda: mlp().model, 6, ModelError, "needs a model with LoRA layers, .* got Mlp without any"),
    "PiSSA": (lambda: attached(init_lora_weights="pissa"), "auto", ModelError, "B = 0, got another B in 2 layers"),
    "a rank above the size": (
        lambda: peft.get_peft_model(mlp().model, peft.LoraConfig(r=11, target_modules=["down"])),
        6,
        ModelError,
        r"layer 'down': a start needs a rank <= min\(out, in\) = 10, got 11",
    ),
    "a frozen factor": (lambda: frozen(attached()), 6, ModelError, "both factors trainable, got frozen ones in down"),
    "disabled layers": (lambda: inactive(attached()), 6, ModelError, "up: disabled; call"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_started_is_refused_and_the_default_is_todays_optimizer(name):
    make, steps, error, match = REFUSED[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        lora_one.optimizer(model, start_steps=steps)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(lora_one.optimizer(model)) is torch.optim.AdamW  # no start is waiting for it


def test_an_optimizer_that_was_made_before_init_is_refused_and_the_model_unchanged():
    model = mlp().model
    optimizer = lora_one.optimizer(model)
    names = [name for name, _ in model.named_parameters()]
    for given in (model, nn.DataParallel(model)):
        with pytest.raises(ModelError, match="got a model with an optimizer, a AdamW: make the optimizer after init"):
            lora_one.init(given, config=CONFIG)
    assert [name for name, _ in model.named_parameters()] == names
    del optimizer
    _, report = lora_one.init(model, config=CONFIG)
    assert len(report.layers) == 3


def test_an_optimizer_in_a_cycle_that_nobody_holds_is_no_reason_to_refuse():
    model = mlp().model
    gc.disable()
    try:
        optimizer = lora_one.optimizer(model)
        optimizer.itself = optimizer
        del optimizer
        lora_one.init(model, config=CONFIG)
    finally:
        gc.enable()


def test_cells_of_a_notebook_run_again():
    """A second optimizer takes the place of the first; a second `init` of the base model that of the first adapter."""
    base = mlp().model
    model, report = lora_one.init(base, config=CONFIG)
    optimizer = lora_one.optimizer(model, start_steps=2)
    run = begun()._replace(model=model, report=report, optimizer=lora_one.optimizer(model, 1e-2, start_steps=2))
    run.train(0, 3)
    assert report.done and not optimizer.param_groups[0]["start_done"]
    with pytest.warns(AdapterWarning):
        model, report = lora_one.init(base, config=CONFIG)
    again = run._replace(model=model, report=report, optimizer=lora_one.optimizer(model, 1e-2, start_steps=2))
    again.train(0, 3)
    fresh = begun(start_steps=2)
    fresh.model.train()
    fresh.train(0, 3)
    assert same(again.model, fresh.model)


def test_of_two_optimizers_that_make_the_start_of_a_model_the_second_one_to_step_is_refused():
    run = begun(start_steps=3)
    other = run._replace(optimizer=lora_one.optimizer(run.model, 1e-2, start_steps=3))
    other.train(0, 1)
    factors = [p.detach().clone() for p in run.model.parameters()]
    run.backward(1)
    with pytest.raises(ModelError, match="got others in up, shared, down: another optimizer has made the start"):
        run.optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(run.model.parameters(), factors, strict=True))
    assert run.optimizer.param_groups[0]["start_taken"] == 0
    other.train(1, 4)
    assert run.report.done and run.report.steps == 3


def test_factors_that_are_flat_or_not_in_the_optimizer_are_refused():
    run = begun(start_steps=3)
    run.train(0, 1)
    run.optimizer.load_state_dict(run.optimizer.state_dict())  # as a checkpoint is loaded
    run.backward(1)
    a = run.pairs[1].lora_A
    a.data, a.grad = a.detach()[:, :12].clone(), a.grad[:, :12].clone()
    with pytest.raises(ModelError, match=r"lora_A must stay a matrix .* was \(4, 24\), got \(4, 12\)\. DeepSpeed"):
        run.optimizer.step()
    run.optimizer.param_groups[0]["params"].clear()
    with pytest.raises(ModelError, match=r"lora_A must stay a matrix .* was \(4, 12\), got None"):
        run.optimizer.step()


def test_layers_that_share_a_factor_are_refused():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), peft.LoraConfig(target_modules=["0", "1"], r=2)
    )
    first, second = model.base_model.model
    second.lora_A.default.weight = first.lora_A.default.weight
    with pytest.raises(ModelError, match=r"factors of its own, got a lora_A \(2, 6\) that two pairs share"):
        lora_one.optimizer(model, start_steps=3)


def test_another_adapter_than_the_one_that_init_started_is_refused():
    run = begun(start_steps=3)
    run.model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"]))
    run.model.set_adapter("other")
    with pytest.raises(ModelError, match="those that init has reported, up, shared, down; got up: call init again"):
        lora_one.optimizer(run.model)


def test_two_models_in_one_are_refused():
    both = nn.ModuleList([begun().model, begun().model])
    with pytest.raises(ModelError, match="one start is made at a time, got 2 models in one"):
        lora_one.optimizer(both)


@pytest.mark.parametrize(("steps", "what"), [(0, "plain LoRA, untrained"), (2, "an unfinished start"), (3, None)])
def test_what_is_saved_or_merged_before_the_start_is_made_is_named(tmp_path, recwarn, steps, what):
    run = begun(start_steps=3)
    run.train(0, steps)
    lora_one.save(run.model, tmp_path / "adapter", run.report)
    lora_one.merge(run.model)
    messages = [str(w.message) for w in recwarn if w.category is UnfinishedStartWarning]
    beginning = f"LoRA-One's start is not made yet, after {steps} steps, so "
    expected = (
        [f"{beginning}{where} {what}: " for where in ("the folder holds", "the merged model has")] if what else []
    )
    assert [message[: len(start)] for message, start in zip(messages, expected, strict=True)] == expected


def test_an_adapter_that_was_saved_in_mid_start_trains_on_without_one(tmp_path):
    run = begun(llama, start_steps=3)
    run.train(0, 2)
    with pytest.warns(UnfinishedStartWarning):
        lora_one.save(run.model, tmp_path / "adapter", run.report)
    model = lora_one.load(llama().model, tmp_path / "adapter", trainable=True)
    with pytest.raises(
        ModelError, match=r"B = 0, got another B in 14 layers: .*to train on from here, pass start_steps=0"
    ):
        lora_one.optimizer(model, start_steps="auto")
    assert type(lora_one.optimizer(model)) is torch.optim.AdamW


def test_a_pair_by_hand_is_checked_as_well():
    run = begun(start_steps=3)
    pair = LoraPair(*(nn.Parameter(x.detach().clone()) for x in run.pairs[0]))
    with pytest.raises(ModelError, match="each factor of a pair must be in params"):
        LoraOneAdamW(pair, (), start=run.optimizer._start)
