"""The steps of a start are those of core in float64, and afterwards they are those of torch's AdamW."""

import copy

import numpy as np
import peft
import pytest
import torch
from torch import nn

import lora_one
from lora_one.backends.torch import deferred
from lora_one.core.deferred import settled, start_state, start_step
from lora_one.core.factors import Factors
from lora_one.errors import ZeroGradientWarning
from tests.backends.torch.deferred.runs import Run, begun, same
from tests.backends.torch.models import Case, classifier, gpt2, llama, mlp

numpy_ops = lora_one.backends.load_backend("numpy").ops
GAMMA = 128.0


def float64(pair) -> Factors:
    return Factors(*(x.detach().double().cpu().numpy().copy() for x in pair))


def gradient(pair) -> Factors:
    return float64(torch.zeros_like(x) if x.grad is None else x.grad for x in pair)


def assert_steps_of_core(run: Run, tolerance: float) -> None:
    """Train until the start is made, and compare each step with that of core from the same factors and gradients."""
    least, most = (6, 16) if run.report.start_steps == "auto" else (run.report.start_steps,) * 2
    states = [start_state(numpy_ops, float64(pair)) for pair in run.pairs]
    done, steps = False, 0
    while not done:
        run.backward(steps)
        expected = [float64(pair) for pair in run.pairs]
        for i, pair in enumerate(run.pairs):
            expected[i], states[i] = start_step(numpy_ops, expected[i], gradient(pair), states[i], GAMMA)
        steps += 1
        done = steps == most or (steps >= least and bool(settled(numpy_ops, np.array(float(steps)), states)))
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert (run.report.steps, run.report.done, run.optimizer.starting) == (steps, done, not done)
        for pair, factors, state, layer in zip(run.pairs, expected, states, run.report.layers, strict=True):
            for got, want in zip(float64(pair), factors, strict=True):
                np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())
            np.testing.assert_allclose(layer.singular_values, state.s / state.s[0], atol=tolerance)
            np.testing.assert_allclose(layer.agreement, state.agreement, atol=tolerance)
            s = run.optimizer.state[pair.lora_A]["start_s"]
            assert s.untyped_storage().nbytes() == s.nbytes  # a part of a stack would be saved with all of it


@pytest.mark.feature("Start without data")
@pytest.mark.parametrize("make", [mlp, llama, gpt2, classifier])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("way", ["one by one", "stacks"])
def test_each_step_is_that_of_core_in_float64_numpy(monkeypatch, make, dtype, tolerance, way):
    monkeypatch.setattr(deferred, "_ONE_BY_ONE", ("cpu",) if way == "one by one" else ())
    assert_steps_of_core(begun(make, dtype), tolerance)


def test_stacks_in_parts_are_stacks(monkeypatch):
    monkeypatch.setattr(deferred, "_ONE_BY_ONE", ())
    monkeypatch.setattr(deferred, "STACK_BYTES", 3 * 4 * 4 * (32 + 32))  # of three pairs of 32 x 32
    assert_steps_of_core(begun(llama), 1e-4)


@pytest.mark.parametrize("fused", [None, True, False])
def test_afterwards_it_is_torchs_adamw_with_fresh_state(fused):
    run = begun(start_steps=3, weight_decay=0.1, fused=fused)
    run.train(0, 3)
    model = copy.deepcopy(run.model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    other = run._replace(
        model=model, optimizer=torch.optim.AdamW(trainable, 1e-2, weight_decay=0.1, fused=fused is not False)
    )
    run.train(3, 8)
    other.train(3, 8)
    assert same(run.model, model)


def test_afterwards_the_preconditioner_is_that_of_a_new_optimizer():
    run = begun(start_steps=3, precondition=True, reg=1e-2)
    run.train(0, 3)
    model = copy.deepcopy(run.model)
    other = run._replace(model=model, optimizer=lora_one.optimizer(model, 1e-2, precondition=True, reg=1e-2))
    run.train(3, 8)
    other.train(3, 8)
    assert same(run.model, model)


def test_the_preconditioner_changes_nothing_of_the_start():
    runs = [begun(start_steps=4, precondition=precondition) for precondition in (False, True)]
    for run in runs:
        run.train(0, 4)
    assert same(runs[0].model, runs[1].model)


def test_no_steps_are_todays_optimizer():
    run = begun(start_steps=0)
    assert type(run.optimizer) is torch.optim.AdamW and (run.report.steps, run.report.done) == (0, False)
    assert "start_taken" not in run.optimizer.param_groups[0]


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**20])
def test_a_power_of_two_in_the_loss_changes_no_bit_of_the_start(factor):
    runs = [begun(llama, torch.float64, start_steps=6) for _ in range(2)]
    runs[0].train(0, 6)
    runs[1].train(0, 6, factor)
    assert same(runs[0].model, runs[1].model)


def test_another_factor_changes_it_by_rounding_only():
    runs = [begun(dtype=torch.float64, start_steps=3) for _ in range(2)]
    runs[0].train(0, 3)
    runs[1].train(0, 3, 1e-3)
    for x, y in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_parameters_outside_of_pairs_train_from_the_first_step_by_adamw():
    run = begun(classifier, start_steps=2)
    head = [p for name, p in run.model.named_parameters() if p.requires_grad and "lora_" not in name]
    copies = [nn.Parameter(p.detach().clone()) for p in head]
    reference = torch.optim.AdamW(copies, 1e-2, weight_decay=0.0, fused=True)
    for i in range(4):
        run.backward(i)
        for p, q in zip(head, copies, strict=True):
            q.grad = p.grad.clone()
        run.optimizer.step()
        reference.step()
        run.optimizer.zero_grad()
    assert len(head) == 2 and all(torch.equal(p, q) for p, q in zip(head, copies, strict=True))
    a, b = run.pairs[0]
    assert [int(run.optimizer.state[p]["step"]) for p in (head[0], a, b)] == [4, 2, 2]


@pytest.mark.feature("Learning-rate schedules")
def test_rates_schedules_and_groups_hold_after_the_start_and_their_clock_runs_in_it():
    run = begun(start_steps=2, loraplus_lr_ratio=4.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0 / (1 + step))
    before = None
    for i in range(3):
        if i == 2:
            before = [(a.detach().clone(), b.detach().clone()) for a, b in run.pairs]
        run.train(i, i + 1)
        schedule.step()
    # AdamW's first step of a parameter moves each entry by the rate, where the gradient is not tiny.
    for (a, b), (old_a, old_b) in zip(run.pairs, before, strict=True):
        assert float((a - old_a).detach().abs().median()) == pytest.approx(1e-2 / 3, rel=1e-3)
        assert float((b - old_b).detach().abs().median()) == pytest.approx(4e-2 / 3, rel=1e-3)


class Two(nn.Module):
    """Two layers, of which the loss may leave out the second."""

    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(8, 6), nn.Linear(8, 6)
        self.weight: float | None = None  # of the second in the loss

    def forward(self, x):
        return self.used(x) if self.weight is None else self.used(x) + self.weight * self.other(x)


@pytest.mark.parametrize("weight", [None, 0.0, float("nan")])
def test_a_pair_without_a_gradient_keeps_plain_loras_start_is_named_and_trains_later(weight):
    torch.manual_seed(0)
    batches = [(torch.randn(5, 8), torch.randn(5, 6)) for _ in range(2)]
    case = Case(Two(), batches, lambda model, batch: (model(batch[0]) - batch[1]).square().mean())
    model, report = lora_one.init(case.model, config=lora_one.Config(rank=2, targets=["used", "other"]))
    run = Run(model, report, lora_one.optimizer(model, 1e-2, start_steps=3), case)
    before = run.pairs[1].lora_A.detach().clone()
    run.train(0, 2)
    assert [layer.start for layer in report.layers] == ["spectral", "waiting"]
    if weight is not None:  # through the second, whose gradient alone is then zero or NaN
        run.backward(2)
        for factor in run.pairs[1]:
            factor.grad = torch.full_like(factor, weight)
    else:
        run.backward(2)
    with pytest.warns(ZeroGradientWarning, match="1 of 2 layers had no gradient in the 3 steps .*: other"):
        run.optimizer.step()
    run.optimizer.zero_grad()
    assert report.done and report.plain_layers == ["other"]
    assert torch.equal(run.pairs[1].lora_A, before) and not run.pairs[1].lora_B.any()
    case.model.weight = 1.0
    run.train(3, 4)
    moved = run.pairs[1].lora_B.detach().abs()
    assert float(moved.median()) == pytest.approx(1e-2, rel=1e-3)


def test_a_layer_that_comes_late_is_started_from_its_own_first_gradient():
    torch.manual_seed(0)
    batches = [(torch.randn(5, 8), torch.randn(5, 6))]
    case = Case(Two(), batches, lambda model, batch: (model(batch[0]) - batch[1]).square().mean())
    model, report = lora_one.init(case.model, config=lora_one.Config(rank=2, targets=["used", "other"]))
    run = Run(model, report, lora_one.optimizer(model, 1e-2, start_steps=3), case)
    run.train(0, 2)
    case.model.weight = 1.0
    run.backward(2)
    pair = float64(run.pairs[1])
    expected, _ = start_step(numpy_ops, pair, gradient(run.pairs[1]), start_state(numpy_ops, pair), GAMMA)
    run.optimizer.step()
    for got, want in zip(float64(run.pairs[1]), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert report.plain_layers == [] and report.done


def test_a_step_without_any_gradient_does_not_count():
    run = begun(start_steps=2)
    run.optimizer.step()
    run.train(0, 1)
    for factor in (factor for pair in run.pairs for factor in pair):
        factor.grad = torch.zeros_like(factor)
    run.optimizer.step()
    assert (run.report.steps, run.report.done) == (1, False)
    run.train(1, 2)
    assert (run.report.steps, run.report.done) == (2, True)


def test_factors_in_bfloat16_are_those_of_float64_rounded():
    run = begun(llama, torch.bfloat16, start_steps=3)
    run.model.to(torch.bfloat16)  # PEFT keeps the factors in float32
    assert_steps_of_core(run, 5e-3)
    assert {factor.dtype for pair in run.pairs for factor in pair} == {torch.bfloat16}
    assert run.optimizer.state[run.pairs[0].lora_A]["start_s"].dtype == torch.float32


def test_lora_that_somebody_else_attached_is_started_if_asked():
    case = mlp()
    model = peft.get_peft_model(case.model, peft.LoraConfig(r=4, target_modules=["up", "down"]))
    assert type(lora_one.optimizer(model)) is torch.optim.AdamW
    optimizer = lora_one.optimizer(model, 1e-2, start_steps=3)
    run = Run(model, optimizer._start.plan.report, optimizer, case)
    run.train(0, 3)
    assert [layer.name for layer in run.report.layers] == ["up", "down"] and run.report.done
    for a, b in map(float64, run.pairs):  # all rows of A are (r / gamma)^(1/2) long; B has the rest
        np.testing.assert_allclose(a @ a.T, 4 / GAMMA * np.eye(4), atol=1e-5 / GAMMA)
        gram = b.T @ b
        assert gram[0, 0] == pytest.approx(1 / (4 * GAMMA), rel=1e-5)
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-6 / GAMMA


class Wrapped(nn.Module):
    """A module of the user's own around the model, as Lightning's is."""

    def __init__(self, model):
        super().__init__()
        self.net = model


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, Wrapped], ids=["compile", "parallel", "module"])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_the_start_is_found_inside_of_wrappers(wrap, whose):
    base = mlp().model
    if whose == "ours":
        model, report = lora_one.init(base, config=lora_one.Config(rank=4))
        optimizer = lora_one.optimizer(wrap(model))
        assert optimizer._start.plan.report is report
    else:
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["up", "shared", "down"]))
        optimizer = lora_one.optimizer(wrap(model), start_steps="auto")
    assert [layer.name for layer in optimizer._start.plan.report.layers] == ["up", "shared", "down"]
    assert (optimizer._start.plan.least, optimizer._start.plan.most) == (6, 16)
