"""The passes that read rows: the fold of each batch's gradient, and both sides of the mean gradient, against NumPy."""

import gc
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

import lora_one
from lora_one.backends.mlx import MlxSession
from lora_one.backends.mlx.passes import folding
from lora_one.core.fold import fold
from tests.backends.mlx.models import (
    contents,
    dequantized,
    mean_gradients,
    quantize,
    tiny_llama,
    tiny_mixtral,
    token_batches,
)
from tests.backends.mlx.passes.reading import (
    CONFIG,
    assert_same,
    draw_sides,
    expected_state,
    fold_pass,
    of_layer,
    sides_pass,
    started,
)


@pytest.fixture(autouse=True)
def renewed_by_each_batch(monkeypatch):
    """However few tokens a batch has for a layer, its rows do not wait."""
    monkeypatch.setattr(folding, "TOKENS_PER_DIRECTION", 0)


@pytest.mark.parametrize("base", [None, ("affine", 32, 4)], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_a_fold_pass_folds_each_batchs_gradient(make, base):
    batches = token_batches(count=3)
    model = make() if base is None else quantize(make(), *base)
    gradients = [mean_gradients(dequantized(model, make), [batch]) for batch in batches]
    result, layers, states = fold_pass(model, batches)
    assert result.batches == 3 and result.loss == pytest.approx(4.9, rel=0.1) and len(layers) == len(states)
    for layer in layers:
        assert_same(states[layer.name], expected_state(layer, [of_layer(g, layer) for g in gradients]))


def test_an_expert_that_no_token_reached_has_no_state():
    batches = token_batches(count=2, sequences=1, length=5)
    gradients = [mean_gradients(tiny_mixtral(experts=16), [batch]) for batch in batches]
    _, layers, states = fold_pass(tiny_mixtral(experts=16), batches)
    reached = [any(of_layer(g, layer).any() for g in gradients) for layer in layers]
    assert [states[layer.name] is not None for layer in layers] == reached
    assert 20 < sum(reached) < len(layers) - 40


@pytest.mark.parametrize("base", [None, ("affine", 32, 4)], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_a_sides_pass_multiplies_the_mean_gradient(make, base):
    batches = token_batches(count=2)
    model = make() if base is None else quantize(make(), *base)
    gradients = mean_gradients(dequantized(model, make), batches)
    result, layers, products = sides_pass(model, batches)
    assert result.batches == 2 and set(products) == {layer.name for layer in layers[1:]}
    for layer in layers[1:]:
        g, (right, left) = of_layer(gradients, layer), draw_sides(layer)
        for got, want in zip(products[layer.name], (g @ right, g.T @ left), strict=True):
            assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


class Shared(nn.Module):
    """One layer that is called three times per forward pass, and one after it."""

    def __init__(self):
        super().__init__()
        mx.random.seed(0)
        self.again, self.last = nn.Linear(24, 24), nn.Linear(24, 20)

    def __call__(self, x):
        for _ in range(3):
            x = mx.tanh(self.again(x))
        return self.last(x)


def mean_square(model, x):
    return mx.mean(model(x) ** 2)


def test_a_layer_that_is_called_several_times_is_folded_once():
    batches = [mx.array(np.random.default_rng(i).standard_normal((2, 15, 24)).astype(np.float32)) for i in range(2)]
    gradients = [nn.value_and_grad(model := Shared(), partial(mean_square, model))(batch)[1] for batch in batches]
    _, layers, states = fold_pass(Shared(), batches, mean_square)
    for layer in layers:
        expected = expected_state(layer, [np.array(g[layer.name]["weight"]).astype(np.float64) for g in gradients])
        assert_same(states[layer.name], expected)


def test_checkpointed_blocks_are_folded_once(monkeypatch):
    batches = token_batches()
    _, layers, expected = fold_pass(tiny_llama(), batches)
    model = tiny_llama()
    block = type(model.layers[0])
    monkeypatch.setattr(block, "__call__", block.__call__)  # undone afterwards
    grad_checkpoint(model.layers[0])
    _, _, states = fold_pass(model, batches)
    for layer in layers:
        assert_same(states[layer.name], expected[layer.name], tolerance=1e-5)


@pytest.mark.parametrize("names_model", [False, True])
def test_a_loss_that_the_user_compiled_folds_alike(names_model):
    batches, model = token_batches(), tiny_llama()
    _, layers, expected = fold_pass(tiny_llama(), batches)
    compiled = mx.compile(lambda *batch: default_loss(model, *batch)[0], inputs=model if names_model else None)
    _, _, states = fold_pass(model, batches, lambda _, batch: compiled(*batch))
    for layer in layers:
        assert_same(states[layer.name], expected[layer.name], tolerance=1e-5)


@pytest.mark.parametrize("exponent", [-14, 10])
def test_the_loss_scale_of_a_float16_model_is_divided_out(exponent):
    """At 2^-14 gradients are below float16's range without a scale; at 2^10 the first scale overflows."""
    make = partial(tiny_llama, layers=1, hidden_size=32, intermediate_size=32)
    batches = token_batches(sequences=1, length=12)
    model = make()
    model.set_dtype(mx.float16)
    gradients = [mean_gradients(dequantized(model, make), [batch]) for batch in batches]
    result, layers, states = fold_pass(model, batches, lambda m, x: default_loss(m, *x)[0] * 2.0**exponent)
    assert max(result.rounded_away.values()) < 0.01
    for layer in layers:
        expected = expected_state(layer, [2.0**exponent * of_layer(g, layer) for g in gradients])
        assert_same(states[layer.name], expected, tolerance=0.01)  # float16 keeps 11 bits


def nan_loss(model, batch):
    return default_loss(model, *batch)[0] * float("nan")


def nan_gradient(model, batch):
    """A finite loss whose gradient is 0 / 0."""
    loss = default_loss(model, *batch)[0]
    return loss + mx.sqrt(loss - mx.stop_gradient(loss))


@pytest.mark.parametrize(("loss_fn", "message"), [
    (nan_loss, "batch 1: the loss must be finite, got nan"),
    (nan_gradient, "layer 'model.layers.1.mlp.down_proj': its gradient is not finite"),
])  # fmt: skip
def test_after_an_error_the_model_is_as_it_was_and_nothing_of_the_pass_is_in_memory(loss_fn, message):
    model = tiny_llama()
    before = contents(model)
    used = []
    for _ in range(3):
        with pytest.raises(lora_one.errors.GradientError, match=message):
            fold_pass(model, token_batches(), loss_fn)
        gc.collect()
        used.append(mx.get_active_memory())
    after = contents(model)
    assert list(after) == list(before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert used[2] == used[1]


def test_rows_of_small_batches_wait_for_each_other(monkeypatch):
    """At width 4, 32 tokens are enough for a renewal, and the last batch waits for nothing."""
    monkeypatch.setattr(folding, "TOKENS_PER_DIRECTION", 8)
    tokens = []
    monkeypatch.setattr(
        folding, "fold", lambda ops, state, rows: (tokens.append(len(rows.x)), fold(ops, state, rows))[1]
    )
    rng = np.random.default_rng(0)
    batches = [mx.array(rng.standard_normal((n, 24)).astype(np.float32)) for n in (20, 15, 6, 40, 5, 3)]
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(24, 20))
    g = [np.array(nn.value_and_grad(model, mean_square)(model, x)[1]["layers"][0]["weight"]) for x in batches]
    _, [layer], states = fold_pass(model, batches, mean_square)
    assert tokens == [35, 46, 8]
    by_renewal = [(g[i] + g[i + 1]).astype(np.float64) / 2 for i in (0, 2, 4)]
    assert_same(states[layer.name], expected_state(layer, by_renewal))


def test_one_layers_work_is_in_memory_after_the_other_and_none_of_an_earlier_batch():
    batches = token_batches(count=6, sequences=1, length=8)
    used = []
    for count in (1, 6):
        model = tiny_llama(layers=12, hidden_size=128, intermediate_size=384)
        mx.clear_cache()
        resident = mx.get_active_memory()
        with MlxSession(model, batches[:count], None, CONFIG) as session:
            states = {x.name: started(session.ops, x, session.like(x.name)) for x in session.layers}
            session.fold_pass(states)
            used.append(session.peak_memory() - resident)
            total = 4 * sum(layer.out_features * layer.in_features for layer in session.layers)
    assert used[1] < 1.05 * used[0]
    assert used[0] < 0.3 * total
