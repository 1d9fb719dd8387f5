"""A fold pass is the spec's fold of each layer's gradients, whatever the model, the batches and the loss do."""

import numpy as np
import pytest
import torch
from torch import nn

import lora_one
from lora_one.backends.numpy import ops as numpy_ops
from lora_one.backends.torch import TorchSession, ops
from lora_one.backends.torch.passes import folds
from lora_one.core.fold import FoldState, fold, of_mean, start_fold
from lora_one.core.gradient import Gradient, RowProduct, as_matrix
from lora_one.core.omega import draw_omega
from lora_one.core.stacking import stack_of, unstacked
from lora_one.errors import GradientError
from tests.backends.torch.models import CASES, Case, llama, mlp

K = 6
CONFIG = lora_one.Config(rank=4)


def started(arrays, of, layer) -> FoldState:
    width = min(K, layer.out_features, layer.in_features)
    omega, test = (draw_omega(0, layer.name, layer.in_features, columns) for columns in (width, 8))
    return start_fold(arrays, of(omega), layer.out_features, of(test))


def fold_pass(case: Case, batches=None, config=CONFIG):
    """The states of a torch session; of both: name -> the layer."""
    with TorchSession(case.model, case.batches if batches is None else batches, case.loss_fn, config) as session:
        layers = {layer.name: layer for layer in session.layers}
        states = {
            name: started(ops, lambda x, name=name: ops.asarray(x, like=session.like(name)), layer)
            for name, layer in layers.items()
        }
        result, folded = session.fold_pass(states)
    return layers, result, folded


def gradients_by_batch(case: Case) -> list[dict[str, np.ndarray]]:
    of_batches = []
    for batch in case.batches:
        gradients: dict[str, Gradient] = {}
        with TorchSession(case.model, [batch], case.loss_fn, lora_one.Config(rank=4, gradient="exact")) as session:
            session.exact_pass(gradients.__setitem__)
        of_batches.append({name: ops.to_numpy(as_matrix(ops, g)).astype(np.float64) for name, g in gradients.items()})
    return of_batches


def reference(layer, gradients: list[np.ndarray]) -> FoldState:
    state = started(numpy_ops, lambda x: x, layer)
    for g in gradients:
        state = fold(numpy_ops, state, g)
    return of_mean(numpy_ops, state, len(gradients))


def assert_same(got: FoldState, expected: FoldState, tolerance: float) -> None:
    scale = expected.s[0]
    u, s, v = (ops.to_numpy(x).astype(np.float64) for x in got[:3])
    np.testing.assert_allclose(s, expected.s, atol=tolerance * scale)
    whole = (expected.u * expected.s) @ expected.v.T
    np.testing.assert_allclose((u * s) @ v.T, whole, atol=10 * tolerance * scale)
    np.testing.assert_allclose(ops.to_numpy(got.tested), expected.tested, atol=10 * tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_every_model_folds_as_the_spec_does(name, monkeypatch):
    """With rows folded at each batch, or left to wait for the last: then they are one batch of the spec."""
    by_batch = gradients_by_batch(CASES[name]())
    for share, batches in ((0.0, by_batch), (np.inf, None)):
        monkeypatch.setattr(folds, "SHARE_OF_GRADIENT", share)
        monkeypatch.setattr(folds, "LEAST_BYTES", 0)
        layers, result, states = fold_pass(CASES[name]())
        assert result.batches == len(by_batch) and not result.not_folded
        for layer, state in states.items():
            gradients = [g[layer] for g in by_batch if layer in g]
            if state is None:
                assert not gradients
                continue
            if batches is None:
                expected = of_mean(numpy_ops, reference(layers[layer], [sum(gradients)]), len(by_batch))
                assert_same(state, expected, 2e-4)
            elif layer != "shared":  # two calls in each batch: folded one after the other
                assert_same(state, reference(layers[layer], gradients), 2e-4)


def recorded(monkeypatch, record) -> list[int]:
    """Let each fold append `record(state, rows)` to the list."""
    records: list[int] = []
    fold_before = folds.fold
    monkeypatch.setattr(
        folds, "fold", lambda ops, state, rows: records.append(record(state, rows)) or fold_before(ops, state, rows)
    )
    return records


def test_rows_wait_until_they_need_half_of_the_gradients_memory(monkeypatch):
    """Sixteen batches of 4 tokens for a 40 x 30 layer, 1120 bytes each of 4800: a fold at every third, and the last."""
    tokens = recorded(monkeypatch, lambda state, rows: len(rows.x))
    monkeypatch.setattr(folds, "LEAST_BYTES", 0)
    torch.manual_seed(0)
    batches = [torch.randn(4, 30) for _ in range(16)]

    def states():
        torch.manual_seed(1)
        case = Case(nn.Sequential(nn.Linear(30, 40)), batches, lambda model, x: model(x).square().mean())
        return fold_pass(case, config=lora_one.Config(rank=2, targets=["0"]))[2]

    waited = states()
    assert tokens == [12] * 5 + [4]
    monkeypatch.setattr(folds, "SHARE_OF_GRADIENT", 0.0)
    torch.testing.assert_close(states()["0"].s[:2], waited["0"].s[:2], rtol=0.05, atol=0.0)  # random rows: flat spectra
    assert tokens[6:] == [4] * 16
    monkeypatch.setattr(folds, "LEAST_BYTES", 16 * 1120)  # a layer that is small may wait for the last batch
    states()
    assert tokens[22:] == [64]


def test_layers_of_a_kind_go_together_and_a_bound_on_what_waits_is_kept(monkeypatch):
    """As on a GPU: the same states as one by one."""
    monkeypatch.setattr(folds, "LEAST_BYTES", 0)
    expected = fold_pass(llama())[2]
    axes = recorded(monkeypatch, lambda state, rows: state.s.ndim)
    monkeypatch.setattr(TorchSession, "stacks_layers", True)
    for bound in (folds.WAITING_BYTES, 1):
        monkeypatch.setattr(folds, "WAITING_BYTES", bound)
        axes.clear()
        got = fold_pass(llama())[2]
        assert (max(axes) == 2) == (bound > 1)
        for name, state in expected.items():
            torch.testing.assert_close(got[name].s, state.s, rtol=1e-3, atol=1e-4 * float(state.s[0]))


@pytest.mark.parametrize("recompute", [False, True])
def test_where_activations_are_recomputed_fewer_rows_wait(monkeypatch, recompute):
    """Nothing else keeps them alive there, as on a GPU."""
    monkeypatch.setattr(folds, "LEAST_BYTES", 0)
    monkeypatch.setattr(folds, "WAITING_BYTES_RECOMPUTED", 1)
    monkeypatch.setattr(TorchSession, "stacks_layers", True)
    axes = recorded(monkeypatch, lambda state, rows: state.s.ndim)
    fold_pass(llama(), config=lora_one.Config(rank=2, recompute=recompute))
    assert max(axes) == (1 if recompute else 2)


def test_rows_of_unlike_length_share_a_stack():
    torch.manual_seed(0)
    rows = [RowProduct(torch.randn(t, 20), torch.randn(t, 30)) for t in (5, 9)]
    states = [start_fold(ops, torch.randn(30, 4), 20, torch.randn(30, 8)) for _ in rows]
    together = unstacked(fold(ops, stack_of(ops, states), folds._stacked(rows)), 2)
    for state, pair, got in zip(states, rows, together, strict=True):
        torch.testing.assert_close(got.s, fold(ops, state, pair).s)


def test_a_gradient_that_is_not_finite_is_named():
    case = mlp()

    def loss_fn(model, batch):
        loss = case.loss_fn(model, batch)
        loss.register_hook(lambda g: g * torch.inf)
        return loss

    before = {name: x.clone() for name, x in case.model.state_dict().items()}
    with pytest.raises(GradientError, match=r"layer 'down': its gradient is not finite up to batch 3: got \d+ of \d+"):
        fold_pass(case._replace(loss_fn=loss_fn))
    for name, x in case.model.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)
