"""Dropout before lora_a: its exact effect, its streams, and where it is off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lora_one
from lora_one.backends.jax import LinenModel, PytreeModel, attach_plain, unload
from lora_one.errors import ConfigError, ModelError
from tests.backends.jax.models import assert_same, gradients, regression, squared_error, step_of, values

BATCHES = regression(1, rows=8, ins=6, outs=4)
X = BATCHES[0][0]
RATE = 0.25
CONFIG = lora_one.Config(rank=2, dropout=RATE, targets="all-linear")


def net() -> nnx.Module:
    return nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))


def masked(key, x):
    """What is left of x: inverted dropout, as in PEFT."""
    return jnp.where(jax.random.bernoulli(key, 1 - RATE, x.shape), x / (1 - RATE), 0)


@pytest.mark.feature("LoRA dropout")
def test_nnx_layers_drop_the_input_of_lora_a_alone_and_only_in_training(tmp_path):
    adapted, report = lora_one.init(net(), BATCHES, squared_error, CONFIG)
    layer = adapted.layers[0]
    a, b, scale = layer.kernel_lora_a[...], layer.kernel_lora_b[...], layer.kernel_lora_scale
    stream = layer.kernel_lora_dropout.rngs
    expected = step_of(gradients(net(), BATCHES, squared_error)["layers", 0, "kernel"].T, 2)
    np.testing.assert_allclose((a @ b).T, expected, atol=1e-4 * np.abs(expected).max())  # no dropout in the passes
    base = X @ layer.kernel[...] + layer.bias[...]
    plain = base + scale * X @ a @ b
    for count in range(2):  # each call draws anew
        key = jax.random.fold_in(stream.key[...], count)
        expected = base + scale * masked(key, X) @ a @ b
        np.testing.assert_allclose(adapted(X), expected, atol=1e-6)
        assert float(jnp.abs(masked(key, X) - X).max()) > 0
    assert int(stream.count[...]) == 2
    adapted.eval()
    np.testing.assert_allclose(adapted(X), plain, atol=1e-6)
    adapted.train()
    lora_one.save(adapted, tmp_path, report)
    again = lora_one.load(net(), tmp_path, trainable=True)
    assert (again.layers[0].kernel_lora_dropout.rate, again.layers[0].kernel_lora_dropout.deterministic) == (
        RATE,
        False,
    )
    np.testing.assert_allclose(lora_one.load(net(), tmp_path)(X), plain, atol=1e-6)
    merged = lora_one.merge(adapted)
    assert vars(merged.layers[0]).keys() == vars(net().layers[0]).keys()
    np.testing.assert_allclose(merged(X), plain, atol=1e-6)


def test_the_mean_over_many_draws_is_the_layer_without_dropout():
    layer = attach_plain(net(), CONFIG)
    layer.layers[0].kernel_lora_b[...] = jnp.ones((2, 4))
    rows = jnp.tile(X[:1], (40_000, 1))
    mean = layer(rows).mean(0)
    layer.eval()
    full = layer(X[:1])[0]
    spread = float(jnp.abs(full - (X[:1] @ layer.layers[0].kernel[...])[0]).max())
    np.testing.assert_allclose(mean, full, atol=0.03 * spread)


class Stack(nnx.Module):
    def __init__(self):
        make = nnx.vmap(lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key)), in_axes=0, out_axes=0)
        self.blocks = make(jax.random.split(jax.random.key(0), 3))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


def test_each_layer_of_a_scanned_stack_has_its_own_stream():
    model = attach_plain(Stack(), CONFIG)
    blocks = model.blocks
    blocks.kernel_lora_b[...] = jnp.ones((3, 2, 6))
    assert blocks.kernel_lora_dropout.rngs.key.shape == (3,)
    y = X
    for i in range(3):
        a, b, key = blocks.kernel_lora_a[i], blocks.kernel_lora_b[i], blocks.kernel_lora_dropout.rngs.key[i]
        base = y @ blocks.kernel[i] + blocks.bias[i]
        y = base + blocks.kernel_lora_scale * masked(jax.random.fold_in(key, 0), y) @ a @ b
    np.testing.assert_allclose(nnx.jit(lambda model: model(X))(model), y, rtol=1e-4)


def test_settings_that_do_not_fit_change_nothing():
    model = attach_plain(net(), CONFIG)
    before = values(model)
    with pytest.raises(ModelError, match=r"the Config asks for dropout 0.5"):
        lora_one.init(model, BATCHES, squared_error, lora_one.Config(dropout=0.5))
    assert_same(values(model), before)
    assert not model.layers[0].kernel_lora_dropout.deterministic
    attach_plain(model, lora_one.Config(dropout=RATE))
    assert not hasattr(unload(model).layers[0], "kernel_lora_dropout")
    with pytest.raises(ConfigError, match=r"dropout must be 0 for a PytreeModel, got 0.25: dropout acts on the input"):
        lora_one.init(PytreeModel({"kernel": jnp.ones((6, 4))}), BATCHES, squared_error, CONFIG)


class Masked(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(6, use_bias=False, name="d")(x)


@pytest.mark.feature("LoRA dropout")
def test_linen_layers_drop_where_the_call_has_a_stream(tmp_path):
    variables = Masked().init(jax.random.key(0), X)
    batches = [(X, X[:, ::-1])]

    def noisy(model, batch):  # dropout is off in the passes all the same
        return jnp.mean((model(batch[0], rngs={"dropout": jax.random.key(7)}) - batch[1]) ** 2)

    model, report = lora_one.init(LinenModel(Masked(), variables), batches, noisy, CONFIG)
    gradient = jax.grad(lambda v: squared_error(LinenModel(Masked(), v), batches[0]))(variables)
    a, b = model.lora["d"].values()
    expected = step_of(np.asarray(gradient["params"]["d"]["kernel"]).T, 2)
    np.testing.assert_allclose((a @ b).T, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(model(X), X @ (variables["params"]["d"]["kernel"] + model.scaling * a @ b), atol=1e-6)
    eyes = {"d": {"kernel_lora_a": jnp.eye(6), "kernel_lora_b": jnp.eye(6)}}
    shown = model.replace(lora=eyes, variables={"params": {"d": {"kernel": jnp.zeros((6, 6))}}}, scaling=1.0)
    for rngs in ({"dropout": jax.random.key(1)}, jax.random.key(1)):
        left = shown(X, rngs=rngs)
        kept = left != 0
        assert 0.5 < float(kept.mean()) < 0.95
        np.testing.assert_allclose(left, jnp.where(kept, X / (1 - RATE), 0), rtol=1e-6)
    lora_one.save(model, tmp_path, report)
    loaded = lora_one.load(LinenModel(Masked(), variables), tmp_path)
    assert loaded.dropout == RATE
    np.testing.assert_allclose(loaded(X), model(X), atol=1e-6)
    with pytest.raises(ModelError, match=r"dropout 0\.5"):
        lora_one.init(model, batches, squared_error, lora_one.Config(dropout=0.5))
