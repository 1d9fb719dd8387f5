"""The start of a float16 model whose gradients are below float16's range, against float64's."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.trainer import default_loss

import lora_one
from lora_one.backends.mlx.passes.loss_scale import FIRST, STEP, LossScale
from lora_one.errors import UnderflowWarning
from tests.backends.mlx.models import (
    assert_lora_one_start,
    dequantized,
    mean_gradients,
    quantize,
    tiny_llama,
    token_batches,
    warned,
)

EXACT = lora_one.Config(rank=4, gradient="exact")
WHOLE = lora_one.Config(rank=4, oversample=28, passes=2)


def make():
    return tiny_llama(layers=1, hidden_size=32, intermediate_size=32)


def float16(quantised=False):
    model = make()
    model.set_dtype(mx.float16)
    return quantize(model, "affine", 32, 4) if quantised else model


def times(factor):
    """A loss that is as small as a mean over `1 / factor` times as many tokens."""
    return lambda model, batch: default_loss(model, *batch)[0] * factor


@pytest.mark.feature("Float16 and bfloat16")
@pytest.mark.parametrize(("config", "factor", "quantised"), [
    (EXACT, 2.0**-14, False), (EXACT, 2.0**-30, False), (EXACT, 2.0**10, False), (EXACT, 2.0**-14, True),
    (WHOLE, 2.0**-14, False), (WHOLE, 2.0**10, False),
])  # fmt: skip
def test_a_float16_model_starts_where_float64_does(config, factor, quantised):
    batches = token_batches(sequences=1, length=12)
    model = float16(quantised)
    gradients = mean_gradients(dequantized(model, make), batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lora_one.errors.InitWarning)
        _, report = lora_one.init(model, batches, times(factor), config)
    assert_lora_one_start(model, report, gradients, tolerance=0.01)  # float16 keeps 11 bits
    for layer in report.layers:
        assert layer.gradient_norm == pytest.approx(factor * np.linalg.norm(gradients[layer.name]), rel=0.01)
    assert report.base_loss == pytest.approx(factor * 4.9, rel=0.2)
    assert report.passes == (1 if config is EXACT else 2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_other_models_take_no_pass_for_it(dtype):
    calls = []

    def loss_fn(model, batch):
        calls.append(batch)
        return default_loss(model, *batch)[0]

    model = make()
    model.set_dtype(dtype)
    lora_one.init(model, token_batches(), loss_fn, EXACT)
    assert len(calls) == 2


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)


@pytest.mark.parametrize(("exponent", "said"), [(-34, True), (-12, False)])
def test_gradients_that_no_scale_brings_into_range_are_named(exponent, said):
    """Two branches of one loss: when the gradient of one just fits into float16, the other's has no digits left."""
    mx.random.seed(0)
    model, x = Branches(), mx.random.normal((64, 16))
    model.set_dtype(mx.float16)

    def loss_fn(model, x):
        first, second = (mx.mean(layer(x).astype(mx.float32) ** 2) for layer in (model.a, model.b))
        return first + 2.0**exponent * second

    config = lora_one.Config(rank=2, gradient="exact")
    with warned(UnderflowWarning) as texts:
        _, report = lora_one.init(model, [x.astype(mx.float16)], loss_fn, config)
    assert bool(texts) == said
    if said:
        assert "gradients of 1 layers" in texts[0] and "of that of b about" in texts[0]
    kept, lost = report.layers
    assert kept.rounded_away < 1e-3 and (lost.rounded_away > 0.01) == said


def simulated(gradients):
    """Summaries of gradients that are rounded to float16."""

    def at(scale):
        with np.errstate(over="ignore"):
            return {site: (x * scale).astype(np.float16).astype(np.float64) / scale for site, x in gradients.items()}

    return at


def test_the_scale_is_raised_as_far_as_it_helps_and_lowered_by_a_batch_that_overflows():
    rng = np.random.default_rng(0)
    model = nn.Linear(2, 2)
    model.set_dtype(mx.float16)
    gradient = rng.standard_normal(100)
    scale = LossScale(model)
    scale.fit(simulated({"x": gradient * 2.0**-10}))
    assert scale.value == FIRST  # nothing underflows at 2^5
    small = LossScale(model)
    small.fit(simulated({"x": gradient * 2.0**-40}))
    assert small.value == FIRST * STEP**2  # to 2^-15, where steps of 2^-24 are below a thousandth
    kept = simulated({"x": gradient * 2.0**-40})(small.value)["x"]
    np.testing.assert_allclose(kept, gradient * 2.0**-40, rtol=2**-10, atol=2.0**-50)
    small.fit(simulated({"x": gradient * 2.0**-4}))
    at = simulated({"x": gradient * 2.0**-4})
    assert np.isfinite(at(small.value)["x"]).all() and not np.isfinite(at(small.value * STEP)["x"]).all()
    plain = nn.Linear(2, 2)
    assert LossScale(plain).value == 1.0 and not LossScale(plain).is_needed
