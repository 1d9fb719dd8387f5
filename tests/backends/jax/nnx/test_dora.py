"""DoRA on Flax NNX: our layers, whose magnitudes start at the norms of W + s B0 A0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_one
from lora_one.backends.jax import PytreeModel, attach_plain, unload
from lora_one.backends.jax.nnx.adopt import find_adapters
from lora_one.errors import CheckpointError, ModelError
from tests.backends.jax.models import mlp, regression, squared_error

TARGETS = ["fused", "down"]
LORA = lora_one.Config(rank=3, targets=TARGETS)
DORA = dataclasses.replace(LORA, dora=True)
BATCHES = regression()


class Stacked(nnx.Module):
    """Three layers that nnx.scan runs one after the other, and two that nnx.vmap runs side by side."""

    def __init__(self):
        def make(ins, outs):
            return lambda rngs: nnx.Linear(ins, outs, rngs=rngs)

        self.blocks = nnx.vmap(make(8, 8))(nnx.Rngs(0).fork(split=3))
        self.heads = nnx.vmap(make(8, 7))(nnx.Rngs(1).fork(split=2))

    def __call__(self, x):
        x = nnx.scan(lambda x, block: jnp.tanh(block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return jnp.sum(nnx.vmap(lambda head, x: head(x), in_axes=(0, None))(self.heads, x), 0)


def layers_of(model) -> list:
    return find_adapters(model, lora_one.Config())


def output(model) -> np.ndarray:
    model.eval()
    return np.asarray(model(BATCHES[0][0]))


def train(model, tx, steps: int = 3) -> None:
    model.eval()
    trainer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    for i in range(steps):
        gradients = nnx.grad(squared_error, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, BATCHES[i % 3])
        trainer.update(model, gradients)


def assert_computes_the_sum(model) -> None:
    for layer in layers_of(model):
        layout = layer.site.layout
        a = np.asarray(layer.a[...], np.float64).reshape(layout.count, layout.in_features, -1)
        b = np.asarray(layer.b[...], np.float64).reshape(layout.count, -1, layout.out_features)
        w = np.asarray(layer.kernel[...], np.float64).reshape(layout.count, layout.in_features, layout.out_features)
        m = np.asarray(layer.m[...]).reshape(layout.count, layout.out_features)
        np.testing.assert_allclose(m, np.linalg.norm(w + layer.site.native * a @ b, axis=1), rtol=1e-6)


@pytest.mark.feature("DoRA")
@pytest.mark.parametrize("changes", [{"gradient": "exact"}, {"gamma": "auto"}], ids=str)
def test_the_start_is_that_of_lora_and_the_model_computes_w_plus_s_a_b(changes):
    lora, one = lora_one.init(mlp(), BATCHES, squared_error, dataclasses.replace(LORA, **changes))
    dora, two = lora_one.init(mlp(), BATCHES, squared_error, dataclasses.replace(DORA, **changes))
    for x, y in zip(layers_of(lora), layers_of(dora), strict=True):
        np.testing.assert_allclose(y.a[...], x.a[...], atol=1e-6)
        np.testing.assert_allclose(y.b[...], x.b[...], atol=1e-6)
    losses = [[trial.loss for trial in report.gamma_trials] for report in (two, one)]
    np.testing.assert_allclose(*losses, rtol=1e-6)  # of gamma="auto", with the magnitudes of each trial
    assert_computes_the_sum(dora)
    np.testing.assert_allclose(output(dora), output(lora), atol=1e-6)


def test_stacked_layers_have_magnitudes_of_their_own():
    config = lora_one.Config(rank=3, targets=["blocks", "heads"])
    lora, _ = lora_one.init(Stacked(), BATCHES, squared_error, config)
    dora, _ = lora_one.init(Stacked(), BATCHES, squared_error, dataclasses.replace(config, dora=True))
    assert dora.blocks.kernel_lora_m.shape == (3, 8) and dora.heads.kernel_lora_m.shape == (2, 7)
    assert_computes_the_sum(dora)
    np.testing.assert_allclose(output(dora), output(lora), atol=1e-6)
    train(dora, lora_one.optimizer(dora, 1e-2))
    expected = output(dora)
    np.testing.assert_allclose(output(lora_one.merge(dora)), expected, atol=1e-5)


def test_the_gradient_of_a_magnitude_is_that_of_its_row_and_adamw_trains_it():
    """With the norm held constant, dL/dm of an output is <dL/dW', w'> / ||w'||, w' its column of the kernel."""
    model, _ = lora_one.init(mlp(), BATCHES, squared_error, DORA)
    model.eval()
    gradients = nnx.grad(squared_error, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, BATCHES[0])
    merged = lora_one.merge(nnx.clone(model))
    of_weights = nnx.grad(squared_error)(merged, BATCHES[0])
    w, g = (np.asarray(x.down.kernel[...], np.float64) for x in (merged, of_weights))
    expected = np.sum(w * g, axis=0) / np.linalg.norm(w, axis=0)
    np.testing.assert_allclose(gradients["down"]["kernel_lora_m"][...], expected, atol=1e-6)
    before = jnp.copy(model.down.kernel_lora_m[...])
    train(model, lora_one.optimizer(model, 1e-2, weight_decay=0.1, precondition=True, loraplus_lr_ratio=4.0), 1)
    plain = optax.adamw(1e-2, weight_decay=0.1)
    update, _ = plain.update(gradients["down"]["kernel_lora_m"][...], plain.init(before), before)
    np.testing.assert_allclose(model.down.kernel_lora_m[...], before + update, rtol=1e-6)


@pytest.mark.feature("DoRA")
def test_saved_loaded_started_again_merged_and_taken_out(tmp_path):
    model, report = lora_one.init(mlp(), BATCHES, squared_error, DORA)
    train(model, lora_one.optimizer(model, 1e-2))
    expected = output(model)
    lora_one.save(model, tmp_path, report)
    np.testing.assert_array_equal(output(lora_one.load(mlp(), tmp_path)), expected)
    np.testing.assert_array_equal(output(lora_one.load(attach_plain(mlp(), DORA), tmp_path)), expected)
    with pytest.raises(CheckpointError, match="fused: only the file has DoRA's magnitudes here"):
        lora_one.load(attach_plain(mlp(), LORA), tmp_path)
    leaves = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))

    def failing(model, batch):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        lora_one.init(model, BATCHES, failing)
    assert all(x is y for x, y in zip(jax.tree.leaves(nnx.state(model, nnx.LoRAParam)), leaves, strict=True))
    again, _ = lora_one.init(lora_one.load(mlp(), tmp_path), BATCHES, squared_error)
    assert_computes_the_sum(again)
    np.testing.assert_allclose(output(lora_one.merge(model)), expected, atol=1e-6)
    np.testing.assert_array_equal(output(unload(again)), output(mlp()))


def test_what_cannot_have_dora_is_refused():
    with pytest.raises(ModelError, match=r"mix: DoRA is for nnx.Linear, and for nnx.LinearGeneral without batch_axis"):
        lora_one.init(mlp(), BATCHES, squared_error, lora_one.Config(dora=True))
    with pytest.raises(ModelError, match=r"no magnitudes of DoRA, .*: down, fused"):
        lora_one.init(attach_plain(mlp(), LORA), BATCHES, squared_error, lora_one.Config(dora=True))
    model = mlp()
    with pytest.raises(ModelError, match="DoRA on JAX starts from batches"):
        lora_one.init(model, config=DORA)
    assert type(model.down) is nnx.Linear and not hasattr(model.down, "kernel_lora_m")
    with pytest.raises(ModelError, match="optax never sees the base weights"):
        lora_one.optimizer(attach_plain(mlp(), DORA), start_steps=3)
    tree = PytreeModel({"up": {"kernel": jnp.eye(8, 7)}})
    with pytest.raises(ModelError, match=r"dora=True on JAX is for a flax.nnx.Module, got PytreeModel"):
        lora_one.init(tree, BATCHES, squared_error, lora_one.Config(dora=True))
