"""Models in bfloat16 and float16: factors that move, gradients that do not vanish, outputs in the model's dtype."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lora_one
from lora_one.backends.jax import LinenModel, PytreeModel
from lora_one.errors import GradientError, UnderflowWarning
from tests.arrays import best_rank
from tests.backends.jax.models import counted_compilations, regression, squared_error

BATCHES = regression(2)
CONFIG = lora_one.Config(rank=2, gradient="exact")


class Two(nnx.Module):
    def __init__(self, dtype, compute=None):
        options = {"rngs": nnx.Rngs(0), "param_dtype": dtype, "dtype": compute or dtype}
        self.up, self.down = nnx.Linear(8, 12, **options), nnx.Linear(12, 7, **options)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class LinenTwo(linen.Module):
    dtype: str

    @linen.compact
    def __call__(self, x):
        h = jnp.tanh(linen.Dense(12, dtype=self.dtype, param_dtype=self.dtype)(x))
        return linen.Dense(7, dtype=self.dtype, param_dtype=self.dtype)(h)


def in_dtype(kind, dtype):
    """(model, loss, factors of the model, its outputs)."""
    if kind == "nnx":
        return Two(dtype), squared_error, lambda m: nnx.state(m, nnx.LoRAParam), lambda m, x: m(x)
    if kind == "linen":
        net = LinenTwo(dtype)
        model = LinenModel(net, net.init(jax.random.key(0), BATCHES[0][0]))
        return model, squared_error, lambda m: m.lora, lambda m, x: m(x)
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 7)).astype(dtype)}

    def out(p, x):
        return x.astype(dtype) @ p["kernel"]

    return (
        PytreeModel(params),
        lambda p, b: jnp.mean((out(p, b[0]) - b[1]) ** 2),
        lambda m: m.lora,
        lambda m, x: out(m.effective(), x),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["nnx", "linen", "pytree"])
def test_factors_are_float32_and_every_entry_moves_at_a_small_rate(kind, dtype, tmp_path):
    model, loss, factors, out = in_dtype(kind, dtype)
    fresh = in_dtype(kind, dtype)[0]
    model, _ = lora_one.init(model, BATCHES, loss, CONFIG)
    assert out(model, BATCHES[0][0]).dtype == dtype
    before = factors(model)
    assert {x.dtype for x in jax.tree.leaves(before)} == {jnp.dtype("float32")}
    lora_one.save(model, tmp_path)
    loaded = factors(lora_one.load(fresh, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(loaded), jax.tree.leaves(before))
    tx = lora_one.optimizer(model, 1e-5)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, before), tx.init(before), before)
    after = optax.apply_updates(before, updates)
    moved = [np.asarray(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    assert np.mean(np.concatenate([m.ravel() for m in moved])) > 0.99
    merged = lora_one.merge(model)
    assert "float32" not in {str(x.dtype) for x in jax.tree.leaves(nnx.state(merged) if kind == "nnx" else merged)}


def test_a_step_of_a_bfloat16_model_compiles_once():
    model, _ = lora_one.init(Two("bfloat16"), BATCHES, squared_error, CONFIG)
    optimizer = nnx.Optimizer(model, lora_one.optimizer(model, 1e-4), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(squared_error, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch))

    step(model, optimizer, BATCHES[0])
    step(model, optimizer, BATCHES[0])
    with counted_compilations() as found:
        step(model, optimizer, BATCHES[1])
    assert found == []


def small(scale):
    """A loss whose gradients in float16 would be zero, or infinite, for all but the scale."""
    return lambda model, batch: scale * squared_error(model, batch)


@pytest.mark.feature("Float16 and bfloat16")
@pytest.mark.parametrize(("params", "compute"), [("float16", "float16"), ("float32", "float16")])
@pytest.mark.parametrize("scale", [1e-7, 1.0, 3e4])
def test_float16_gradients_neither_vanish_nor_overflow(params, compute, scale):
    model = Two(params, compute)
    kernels = {"up": model.up, "down": model.down}
    wide = Two("float32")
    for name, layer in kernels.items():
        getattr(wide, name).kernel[...] = layer.kernel[...].astype("float32")
    truth = [nnx.grad(squared_error)(wide, batch) for batch in BATCHES]
    model, report = lora_one.init(model, BATCHES, small(scale), CONFIG)
    for layer in report.layers:
        g = np.mean([np.asarray(t[layer.name]["kernel"][...], np.float64).T for t in truth], axis=0)
        adapted = getattr(model, layer.name)
        got = -(np.asarray(adapted.kernel_lora_a[...], np.float64) @ np.asarray(adapted.kernel_lora_b[...])).T
        expected = best_rank(g, 2)
        cosine = np.sum(got * expected) / np.linalg.norm(got) / np.linalg.norm(expected)
        assert cosine > 0.999, layer.name
        assert layer.gradient_norm == pytest.approx(scale * np.linalg.norm(g), rel=2e-2)


class Uneven(nnx.Module):
    """Two layers side by side, the second's gradients far below the first's."""

    def __init__(self, dtype, share):
        options = {"rngs": nnx.Rngs(0), "param_dtype": dtype, "dtype": dtype}
        self.large, self.small, self.share = nnx.Linear(8, 7, **options), nnx.Linear(8, 7, **options), share

    def __call__(self, x):
        tiny = self.small(x) * jnp.asarray(self.share, self.small.dtype)
        return (100 * self.large(x)).astype("float32") + tiny.astype("float32") * 1e-4


@pytest.mark.parametrize(
    ("dtype", "share", "warns"), [("float16", 1e-5, True), ("float16", 1.0, False), ("bfloat16", 1e-5, False)]
)
def test_gradients_that_no_scale_keeps_are_warned_of(dtype, share, warns):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _, report = lora_one.init(Uneven(dtype, share), BATCHES, squared_error, CONFIG)
    found = [str(w.message) for w in seen if issubclass(w.category, UnderflowWarning)]
    assert len(found) == warns
    assert {w.filename for w in seen if issubclass(w.category, UnderflowWarning)} <= {__file__}
    assert all("of that of small" in text for text in found)
    assert [layer.rounded_away > 0.01 for layer in report.layers] == [False, warns]


def test_a_gradient_that_no_scale_makes_finite_is_an_error():
    def loss(model, batch):
        y = model(batch[0])
        return jnp.mean(y) + jnp.sum(jnp.sqrt(jnp.abs(y - jax.lax.stop_gradient(y))))  # 0 * inf backwards

    with pytest.raises(GradientError):
        lora_one.init(Two("float16"), BATCHES, loss, CONFIG)
