import pickle
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_one
from lora_one.backends.jax import open_session, register_layer, unload
from lora_one.backends.jax.layout import plain_layout
from lora_one.backends.jax.nnx.layers import factors_of
from lora_one.backends.jax.product import add_general
from lora_one.errors import BatchError, GradientError, ModelError
from lora_one.initialization import initialize
from tests.backends.jax.models import (
    assert_same,
    gradients,
    mlp,
    regression,
    squared_error,
    step_of,
    values,
)

BATCHES = regression()
CONFIG = lora_one.Config(rank=3, passes=2)  # as wide as the layers: two passes see all there is
# path of the kernel -> (in, out)
KERNELS = {"up": (8, 12), "shared": (12, 12), "fused": (12, 24), "mix": (24, 9), "down": (9, 7)}


@pytest.fixture(scope="module")
def started():
    """(the model before, its arrays, the model after, the report)."""
    model = mlp()
    before = values(model)
    adapted, report = lora_one.init(model, BATCHES, squared_error, CONFIG)
    return mlp(), before, adapted, report


def product(layer, ins: int, outs: int) -> np.ndarray:
    """B A of the spec, (out, in)."""
    a, b = (np.asarray(x, np.float64) for x in factors_of(layer)[:2])
    return (a.reshape(ins, -1) @ b.reshape(-1, outs)).T


@pytest.mark.feature("Start in one pass")
@pytest.mark.feature("Linear layers")
def test_factors_are_one_gradient_step_in_every_kind_of_layer(started):
    """The sketch sees all directions of these small layers, so it must give the exact SVD's start."""
    plain, _, adapted, report = started
    truth = gradients(plain, BATCHES, squared_error)
    assert {layer.name for layer in report.layers} == set(KERNELS)
    for name, (ins, outs) in KERNELS.items():
        expected = step_of(truth[name, "kernel"].reshape(ins, outs).T, 3)
        got = product(getattr(adapted, name), ins, outs)
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), err_msg=name)
    for layer in report.layers:
        norm = np.linalg.norm(truth[layer.name, "kernel"])
        assert layer.gradient_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.feature("Exact gradient")
def test_exact_gradients_give_the_same_factors(started):
    _, _, sketched, _ = started
    adapted, report = lora_one.init(mlp(), BATCHES, squared_error, lora_one.Config(rank=3, gradient="exact"))
    assert report.passes == 1
    for name, (ins, outs) in KERNELS.items():
        expected = product(getattr(sketched, name), ins, outs)
        got = product(getattr(adapted, name), ins, outs)
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), err_msg=name)


def test_base_paths_and_values_stay_and_factors_lie_beside_them(started):
    _, before, adapted, _ = started
    after = values(adapted)
    assert_same({path: after[path] for path in before}, before)
    added = {path: value.shape for path, value in after.items() if path not in before}
    assert added["fused", "kernel_lora_a"] == (12, 3)
    assert added["fused", "kernel_lora_b"] == (3, 3, 2, 4)
    assert added["mix", "kernel_lora_a"] == (3, 2, 4, 3)
    assert len(added) == 2 * len(KERNELS)
    assert {tuple(path) for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))} == set(added)


def test_the_layer_computes_w_x_plus_s_b_a_x(started):
    _, _, adapted, _ = started
    layer, x = adapted.up, BATCHES[0][0]
    s = 16 / np.sqrt(3)
    expected = x @ (np.asarray(layer.kernel[...]) + s * product(layer, 8, 12).T) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


@pytest.mark.feature("Merge")
def test_split_merge_clone_pickle_and_merge_keep_the_function(started):
    plain, before, adapted, _ = started
    x = BATCHES[0][0]
    adapted = nnx.clone(adapted)
    adapted.eval()
    y = adapted(x)
    np.testing.assert_array_equal(nnx.merge(*nnx.split(adapted))(x), y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(adapted))(x), y)
    merged = lora_one.merge(nnx.clone(adapted))
    assert type(merged.fused) is nnx.LinearGeneral
    assert values(merged).keys() == before.keys()
    np.testing.assert_allclose(merged(x), y, atol=1e-5)
    plain.eval()
    assert float(np.abs(plain(x) - y).max()) > 1e-4
    unloaded = unload(nnx.clone(adapted))
    assert type(unloaded.up) is nnx.Linear
    np.testing.assert_array_equal(unloaded(x), plain(x))


def test_dropout_is_off_during_the_passes_and_modes_come_back(started):
    _, _, adapted, report = started
    assert adapted.dropout.deterministic is False
    plain = mlp()
    plain.eval()
    assert report.base_loss == pytest.approx(np.mean([float(squared_error(plain, b)) for b in BATCHES]), rel=1e-5)


def test_only_the_factors_train_with_nnx_optimizer():
    import optax

    model = mlp()
    adapted, _ = lora_one.init(model, BATCHES, squared_error, lora_one.Config(rank=2, targets=["up", "down"], passes=2))
    before = values(adapted)
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def train(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(squared_error, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
        optimizer.update(model, grads)
        return loss

    adapted.eval()
    losses = [float(train(adapted, optimizer, BATCHES[0])) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    after = values(adapted)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {(name, f"kernel_lora_{side}") for name in ("up", "down") for side in "ab"}


def test_a_session_that_is_not_open_says_so():
    session = open_session(mlp(), BATCHES, squared_error, CONFIG)
    with pytest.raises(RuntimeError, match="must be open: with open_session"):
        session.mean_loss()


def test_an_error_anywhere_leaves_the_model_as_it_was():
    model = mlp()
    before, calls = values(model), []

    def fails(model, batch):
        calls.append(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lora_one.init(model, BATCHES, fails, CONFIG)
    with pytest.raises(GradientError, match="batch 2: the loss must be finite"):
        lora_one.init(model, [BATCHES[0], (BATCHES[0][0] * np.inf, BATCHES[0][1])], squared_error, CONFIG)
    with pytest.raises(ModelError, match="'down': rank must be <= min\\(out, in\\) = 7, got 8"):
        lora_one.init(model, BATCHES, squared_error, lora_one.Config(rank=8, targets=["down"]))
    assert calls
    assert_same(values(model), before)
    assert type(model.up) is nnx.Linear
    assert model.dropout.deterministic is False
    assert not hasattr(model.up, "kernel_lora_scale")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: (squared_error(m, b), {"aux": 1}), "batch 1: the loss must be a scalar array, got tuple"),
        (lambda m, b: m(b[0]), r"batch 1: the loss must be a scalar array, got shape \(16, 7\)"),
        (lambda m, b: jnp.sum(m(b[0])).astype(int), "batch 1: the loss must be floating, got int32"),
        (lambda m, b: 1.0, "batch 1: the loss must depend on the target layers, got a constant float"),
        (lambda m, b: jnp.sum(b[0]), "no target layer has a gradient"),
        (None, "pass loss_fn="),
    ],
)
def test_losses_that_cannot_be(loss, message):
    with pytest.raises(BatchError, match=message):
        lora_one.init(mlp(), BATCHES, loss, lora_one.Config(rank=2, targets=["down"]))


def test_batches_targets_and_settings_that_cannot_be():
    with pytest.raises(BatchError, match="read 2 times, got a list_iterator that can be read once"):
        lora_one.init(mlp(), iter(BATCHES), squared_error)
    with pytest.raises(BatchError, match="at least one batch"):
        lora_one.init(mlp(), [], squared_error, CONFIG)
    with pytest.raises(BatchError, match="leaves of type set"):
        lora_one.init(mlp(), [{"x": {1}}], squared_error, CONFIG)
    with pytest.raises(ModelError, match=r"got 'nothing'; its linear layers are: .*fused"):
        lora_one.init(mlp(), BATCHES, squared_error, lora_one.Config(targets="nothing"))


class Scaled(nnx.Linear):
    """Somebody else's layer."""

    def __call__(self, x, out_sharding=None):
        return 2.0 * super().__call__(x)


class LoraScaled(Scaled):
    def __call__(self, x, out_sharding=None):
        return add_general(super().__call__(x), x, *factors_of(self), axis=(x.ndim - 1,))


def test_a_layer_of_ones_own_is_an_error_until_it_is_registered():
    layer = Scaled(8, 7, rngs=nnx.Rngs(0))
    model = nnx.Sequential(layer)
    with pytest.raises(ModelError, match=r"layers.0: it is a Scaled, a subclass of Linear: register it"):
        lora_one.init(model, BATCHES, squared_error, CONFIG)
    register_layer(Scaled, LoraScaled, lambda layer: plain_layout(layer.kernel.shape, 1, 1))
    adapted, _ = lora_one.init(model, BATCHES, squared_error, CONFIG)
    # y = 2 x W + s x a b: LoRA sees the gradient of the outer product, half of the kernel's.
    truth = gradients(nnx.Sequential(Scaled(8, 7, rngs=nnx.Rngs(0))), BATCHES, squared_error)
    expected = step_of(truth["layers", 0, "kernel"].T, 3)
    np.testing.assert_allclose(product(adapted.layers[0], 8, 7), expected, atol=2e-5 * np.abs(expected).max())


class Stacked(nnx.Module):
    """Three layers in one, by nnx.vmap and nnx.scan."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(8, 7, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return jnp.tanh(block(x)) + x

        return self.head(run(x, self.blocks))


def test_scanned_layers_get_one_pair_a_slice():
    adapted, report = lora_one.init(Stacked(nnx.Rngs(1)), BATCHES, squared_error, CONFIG)
    truth = gradients(Stacked(nnx.Rngs(1)), BATCHES, squared_error)["blocks", "kernel"]  # (3, in, out)
    assert [layer.name for layer in report.layers] == ["blocks.0", "blocks.1", "blocks.2", "head"]
    a, b = (np.asarray(x, np.float64) for x in factors_of(adapted.blocks)[:2])
    assert a.shape == (3, 8, 3)
    for i in range(3):
        expected = step_of(truth[i].T, 3)
        np.testing.assert_allclose((a[i] @ b[i]).T, expected, atol=2e-5 * np.abs(expected).max())
    x = BATCHES[0][0]
    y = adapted(x)
    np.testing.assert_allclose(lora_one.merge(adapted)(x), y, atol=1e-5)


@pytest.mark.feature("Float16 and bfloat16")
def test_narrow_models_are_sketched_and_trained_in_float32():
    model = mlp(jnp.bfloat16)
    before = values(model)
    adapted, report = lora_one.init(model, BATCHES, squared_error, lora_one.Config(rank=2, targets=["up"], passes=2))
    assert adapted.up.kernel_lora_a.dtype == adapted.up.kernel_lora_b.dtype == jnp.float32
    assert adapted.up(BATCHES[0][0]).dtype == jnp.bfloat16
    assert report.layers[0].energy > 0.3
    after = values(adapted)
    assert_same({path: after[path] for path in before}, before)
    with open_session(
        mlp(jnp.bfloat16), BATCHES, squared_error, lora_one.Config(rank=2, targets=["up"], passes=2)
    ) as session:
        assert session.like("up").dtype == jnp.float32
        initialize(session, lora_one.Config(rank=2, targets=["up"], passes=2), "jax", time.perf_counter())


def test_the_users_precision_flag_is_left_alone():
    with jax.default_matmul_precision("bfloat16"):
        lora_one.init(mlp(), BATCHES[:1], squared_error, lora_one.Config(rank=2, targets=["down"], passes=2))
        assert jax.config.jax_default_matmul_precision == "bfloat16"
