"""The start that the optimizer makes out of the first gradients: numbers, and what torch.optim promises."""

import copy

import numpy as np
import pytest
import torch

import lora_one
from lora_one.backends.torch import LoraOneAdamW, deferred
from lora_one.backends.torch.deferred import PairStarts
from lora_one.core.deferred import settled, start_state, start_step
from lora_one.core.factors import Factors
from tests.backends.torch.models import classifier, llama, mlp

numpy_ops = lora_one.backends.load_backend("numpy").ops
GAMMA = 128.0


def started(make=mlp, dtype=torch.float32, **options):
    """A model without data, its report, its optimizer and its case."""
    case = make()
    model, report = lora_one.init(case.model.to(dtype), config=lora_one.Config(rank=4))
    return model, report, lora_one.optimizer(model, 1e-2, **options), case._replace(batches=to(case.batches, dtype))


def to(batches, dtype):
    return [tuple(x.to(dtype) for x in b) if isinstance(b, tuple) else b for b in batches]


def backward(model, case, i: int, factor: float = 1.0) -> None:
    batch = case.batches[i % len(case.batches)]
    loss = model(**batch).loss if case.loss_fn is None else case.loss_fn(model, batch)
    (loss * factor).backward()


def train(model, optimizer, case, first: int, last: int, factor: float = 1.0) -> None:
    for i in range(first, last):
        backward(model, case, i, factor)
        optimizer.step()
        optimizer.zero_grad()


def pairs_of(optimizer):
    assert isinstance(optimizer, LoraOneAdamW) and isinstance(optimizer._start, PairStarts)
    return optimizer._start.pairs


def float64(pair) -> Factors:
    return Factors(*(x.detach().double().numpy().copy() for x in pair))


def gradient(pair) -> Factors:
    return float64(x.grad if x.grad is not None else torch.zeros_like(x) for x in pair)


def same(one, other) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("make", [mlp, llama, classifier])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("way", ["one by one", "stacks"])
def test_each_step_is_that_of_core_in_float64_numpy(monkeypatch, make, dtype, tolerance, way):
    monkeypatch.setattr(deferred, "_ONE_BY_ONE", ("cpu",) if way == "one by one" else ())
    model, report, optimizer, case = started(make, dtype)
    pairs = pairs_of(optimizer)
    expected = [float64(pair) for pair in pairs]
    states = [start_state(numpy_ops, pair) for pair in expected]
    done, steps = False, 0
    while not done:
        backward(model, case, steps)
        for i, pair in enumerate(pairs):
            expected[i], states[i] = start_step(numpy_ops, expected[i], gradient(pair), states[i], GAMMA)
        steps += 1
        done = steps == 16 or (steps >= 6 and bool(settled(numpy_ops, np.array(float(steps)), states)))
        optimizer.step()
        optimizer.zero_grad()
        assert (report.steps, report.done, optimizer.starting) == (steps, done, not done)
        for pair, factors, state, layer in zip(pairs, expected, states, report.layers, strict=True):
            for got, want in zip(float64(pair), factors, strict=True):
                np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())
            np.testing.assert_allclose(layer.singular_values, state.s / state.s[0], atol=tolerance)
            np.testing.assert_allclose(layer.agreement, state.agreement, atol=tolerance)
            # The next gradient is that of the factors as rounded.
        expected = [float64(pair) for pair in pairs]


@pytest.mark.parametrize("fused", [None, True, False])
def test_afterwards_it_is_torchs_adamw_with_fresh_state(fused):
    model, _, optimizer, case = started(start_steps=3, weight_decay=0.1, fused=fused)
    train(model, optimizer, case, 0, 3)
    other = copy.deepcopy(model)
    trainable = [p for p in other.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(trainable, 1e-2, weight_decay=0.1, fused=fused is not False)
    for net, adamw in ((model, optimizer), (other, theirs)):
        train(net, adamw, case, 3, 8)
    assert same(model, other)


def test_afterwards_the_preconditioner_is_that_of_a_new_optimizer():
    model, _, optimizer, case = started(start_steps=3, precondition=True, reg=1e-2)
    train(model, optimizer, case, 0, 3)
    other = copy.deepcopy(model)
    theirs = lora_one.optimizer(other, 1e-2, precondition=True, reg=1e-2)
    for net, adamw in ((model, optimizer), (other, theirs)):
        train(net, adamw, case, 3, 8)
    assert same(model, other)


def test_no_steps_are_todays_optimizer():
    _model, report, optimizer, _ = started(start_steps=0)
    assert type(optimizer) is torch.optim.AdamW and report.steps == 0 and not report.done
    assert "start_taken" not in optimizer.param_groups[0]


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**20])
def test_a_power_of_two_in_the_loss_changes_no_bit_of_the_start(factor):
    nets = []
    for scale in (1.0, factor):
        model, _, optimizer, case = started(llama, torch.float64, start_steps=6)
        train(model, optimizer, case, 0, 6, scale)
        nets.append(model)
    assert same(*nets)


def test_parameters_outside_of_pairs_train_from_the_first_step_by_adamw():
    model, _, optimizer, case = started(classifier, start_steps=2)
    head = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in head]
    reference = torch.optim.AdamW(copies, 1e-2, weight_decay=0.0, fused=True)
    for i in range(4):
        backward(model, case, i)
        for p, q in zip(head, copies, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    assert len(head) == 2 and all(torch.equal(p, q) for p, q in zip(head, copies, strict=True))
    a, b = pairs_of(optimizer)[0]
    assert [int(optimizer.state[p]["step"]) for p in (head[0], a, b)] == [4, 2, 2]
    assert optimizer.state[a]["exp_avg"].abs().max() > 0
