"""The step of many pairs at once equals the spec's step, pair by pair."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_one.backends.numpy import ops as numpy_ops
from lora_one.backends.torch import LoraOneAdamW, TorchOps, directions
from lora_one.backends.torch.linalg.narrow import narrow_matmul
from lora_one.backends.torch.pairs import LoraPair
from lora_one.core import step
from lora_one.core.factors import Factors
from lora_one.core.precondition import precondition
from lora_one.errors import ConfigError, ModelError

# (r, in, out): tall enough to be folded and not, of ranks that fold by 5, 2 and 1, and alike in every other pair
SHAPES = [(3, 160, 90), (8, 130, 256), (8, 130, 256), (16, 40, 48), (8, 130, 256), (3, 160, 90), (8, 256, 130)]


def make_pairs(shapes=SHAPES, dtype=torch.float64) -> list[LoraPair]:
    torch.manual_seed(0)
    return [LoraPair(*(nn.Parameter(torch.randn(*s, dtype=dtype)) for s in ((r, n), (m, r)))) for r, n, m in shapes]


def parameters(pairs) -> list[nn.Parameter]:
    return [factor for pair in pairs for factor in pair]


def float64(x) -> np.ndarray:
    return x.detach().double().numpy().copy()


def set_gradients(pairs, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters(pairs):
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def specs_step(pair, gradient, state, rate_B, decay_B):
    """One step of the spec; lora_B has its own rate and decay, and a factor without a gradient does not change."""
    filled = Factors(*(np.zeros_like(p) if g is None else g for p, g in zip(pair, gradient, strict=True)))
    by_A, state_A = step.adamw(numpy_ops, pair, filled, state, 1e-2, reg=1e-2)
    by_B, state_B = step.adamw(numpy_ops, pair, filled, state, rate_B, weight_decay=decay_B, reg=1e-2)
    new, states = (by_A.lora_A, by_B.lora_B), (state_A.lora_A, state_B.lora_B)
    stays = [g is None for g in gradient]
    return (
        Factors(*(old if stay else x for old, x, stay in zip(pair, new, stays, strict=True))),
        step.PairState(*(old if stay else x for old, x, stay in zip(state, states, stays, strict=True))),
    )


@pytest.mark.parametrize(
    "way", ["stacked", "stacked, elsewhere", "stacked, each alone", "one by one", "one by one, each alone"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_twenty_steps_are_the_specs_with_two_rates_and_gradients_that_come_and_go(monkeypatch, way, dtype, tolerance):
    monkeypatch.setattr(directions, "_STACKED_BELOW_RANK", {} if way.startswith("stacked") else {"cpu": 8})
    monkeypatch.setattr(
        directions, "_BATCH_BYTES", {} if "elsewhere" in way else {"cpu": 0 if "alone" in way else 2**16}
    )
    pairs = make_pairs(dtype=dtype)
    lora_A, lora_B = (list(side) for side in zip(*pairs, strict=True))
    groups = [{"params": lora_A + lora_B[:2]}, {"params": lora_B[2:], "lr": 3e-2, "weight_decay": 0.1}]
    optimizer = LoraOneAdamW(groups, pairs, reg=1e-2, lr=1e-2, weight_decay=0.0, fused=True)
    expected = [Factors(*map(float64, pair)) for pair in pairs]
    states = [step.start_pair(numpy_ops, pair) for pair in expected]
    for i in range(20):
        set_gradients(pairs, i)
        pairs[1].lora_A.grad = pairs[1].lora_B.grad = None  # never has one
        if i % 3 == 0:
            pairs[2].lora_B.grad = None
            pairs[5].lora_A.grad = pairs[5].lora_B.grad = None
        for j, pair in enumerate(pairs):
            gradient = [None if p.grad is None else float64(p.grad) for p in pair]
            rate_B, decay_B = (3e-2, 0.1) if j >= 2 else (1e-2, 0.0)
            expected[j], states[j] = specs_step(expected[j], gradient, states[j], rate_B, decay_B)
        optimizer.step()
        optimizer.zero_grad()
    for pair, wanted in zip(pairs, expected, strict=True):
        for got, want in zip(pair, wanted, strict=True):
            np.testing.assert_allclose(float64(got), want, rtol=0, atol=tolerance * np.abs(want).max())


class Launches(TorchDispatchMode):
    """Names of the operations that reach the device; views do no work."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.names.append(function.name())
        return result


def test_launches_do_not_grow_with_the_layers_where_launches_count(monkeypatch):
    monkeypatch.setattr(directions, "_STACKED_BELOW_RANK", {})
    counts = []
    for layers in (2, 12):
        pairs = make_pairs([(8, 32, 32), (8, 32, 48)] * layers, torch.float32)
        optimizer = LoraOneAdamW(parameters(pairs), pairs, fused=True)
        for i in range(2):  # the first makes the moments
            set_gradients(pairs, i)
            with Launches() as launched:
                optimizer.step()
        counts.append(len(launched.names))
        assert launched.names.count("aten::linalg_cholesky_ex") == 2
    assert counts[0] == counts[1]


def test_nothing_reads_a_value():
    """Fake tensors have only shapes, and raise if a value is read: a CUDA graph could capture what runs on them."""
    with FakeTensorMode():
        pairs = make_pairs([(8, 32, 32), (3, 32, 48)], torch.float32)
        optimizer = LoraOneAdamW(parameters(pairs), pairs, fused=True)
        for _ in range(2):
            for p in parameters(pairs):
                p.grad = torch.empty_like(p)
            optimizer.step()
        with pytest.raises(DataDependentOutputException):
            pairs[0].lora_A.sum().item()


def test_a_captured_step_needs_capturable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    pairs = make_pairs()
    set_gradients(pairs, 0)
    with pytest.raises(ConfigError, match="capturable=True"):
        LoraOneAdamW(parameters(pairs), pairs).step()
    LoraOneAdamW(parameters(pairs), pairs, capturable=True)._check_capture()


def test_the_preconditioner_compiles_as_one_graph():
    torch.manual_seed(0)
    pair, gradient = (Factors(torch.randn(4, 8, 40), torch.randn(4, 256, 8)) for _ in range(2))
    compiled = torch.compile(partial(precondition, TorchOps(), reg=1e-2), backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(pair, gradient), precondition(TorchOps(), pair, gradient, 1e-2), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_a_step_that_was_compiled_is_the_step(kernel):
    """One graph with `foreach`; torch keeps Dynamo out of its fused kernel."""
    pairs, others = make_pairs(SHAPES[:3], torch.float32), make_pairs(SHAPES[:3], torch.float32)
    optimizer, plain = (LoraOneAdamW(parameters(p), p, reg=1e-2, lr=1e-2, **{kernel: True}) for p in (pairs, others))
    compiled = torch.compile(optimizer.step, backend="eager", fullgraph=kernel == "foreach")
    for i in range(2):
        set_gradients(pairs, i)
        set_gradients(others, i)
        compiled()
        plain.step()
    for got, want in zip(parameters(pairs), parameters(others), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_gradient_scaler_unscales_and_leaves_out_what_is_not_finite():
    pairs, others = make_pairs(SHAPES[:3], torch.float32), make_pairs(SHAPES[:3], torch.float32)
    scaled, plain = (LoraOneAdamW(parameters(p), p, reg=1e-2, lr=1e-2, fused=True) for p in (pairs, others))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, finite in enumerate([True, False, True]):
        set_gradients(pairs, i)
        scaler.scale(torch.zeros(()))  # makes the scale
        for p in parameters(pairs):
            p.grad = p.grad * scaler.get_scale() if finite else p.grad * torch.inf
        scaler.step(scaled)
        scaler.update()
        if finite:
            set_gradients(others, i)
            plain.step()
    for got, want in zip(parameters(pairs), parameters(others), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_hooks_run_once_a_step_whatever_optimizer_was_made_before():
    pairs = make_pairs()
    torch.optim.AdamW(parameters(pairs))  # torch.optim wraps the class's `step` when it is first made
    optimizer = LoraOneAdamW(parameters(pairs), pairs)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    set_gradients(pairs, 0)
    optimizer.step()
    assert calls == ["before", "after"]


def test_a_deep_copy_with_its_parameters_steps_like_the_original():
    pairs = make_pairs()
    optimizer = LoraOneAdamW(parameters(pairs), pairs, reg=1e-2)
    again_pairs, again = copy.deepcopy((pairs, optimizer))
    assert all(x is y for x, y in zip(parameters(again.pairs), parameters(again_pairs), strict=True))
    for i in range(2):
        for these, its in ((pairs, optimizer), (again_pairs, again)):
            set_gradients(these, i)
            its.step()
    assert all(torch.equal(x, y) for x, y in zip(parameters(pairs), parameters(again_pairs), strict=True))


def test_a_pair_twice_is_one_and_a_shared_factor_is_an_error():
    (pair, other) = make_pairs(SHAPES[1:3])
    assert LoraOneAdamW(list(pair), [pair, pair]).pairs == [pair]
    shared = LoraPair(pair.lora_A, other.lora_B)
    with pytest.raises(ModelError, match=r"got a lora_A \(8, 130\) that two pairs share"):
        LoraOneAdamW([*pair, other.lora_B], [pair, shared])
    with pytest.raises(ModelError, match=r"must be in params, got a lora_B \(256, 8\) that is not"):
        LoraOneAdamW([pair.lora_A], [pair])


@pytest.mark.parametrize("columns", [1, 3, 8, 16, 20])
def test_narrow_products_are_products(columns):
    torch.manual_seed(0)
    x, y = (torch.randn(3, 480, columns, dtype=torch.float64) for _ in range(2))
    m = torch.randn(3, columns, columns, dtype=torch.float64)
    for a, b in ((x.mT, y), (x, m), (x.mT, x), (x.mT.contiguous(), x), (m, x.mT)):
        out = torch.empty(3, a.shape[1], b.shape[2], dtype=torch.float64)
        for got in (narrow_matmul(a, b), narrow_matmul(a, b, out), out):
            np.testing.assert_allclose(got, a.numpy() @ b.numpy(), atol=1e-12)
