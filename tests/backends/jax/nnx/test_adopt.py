import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx

import lora_one
from lora_one.errors import GradientError, ModelError
from tests.backends.jax.models import assert_same, gradients, mlp, regression, squared_error, step_of, values

BATCHES = regression(2)
RANK = 3
S = 16 / np.sqrt(RANK)


class Net(nnx.Module):
    """Only layers that qwix can adapt, nothing random."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.fused = nnx.LinearGeneral(12, (3, 4), rngs=rngs)
        self.mix = nnx.Einsum("bnh,nhd->bd", (3, 4, 9), rngs=rngs)
        self.down = nnx.Linear(9, 7, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.mix(jnp.tanh(self.fused(jnp.tanh(self.up(x)))))))


class Wrapped(nnx.Module):
    """nnx.LoRA around one layer, nnx.LoRALinear as the other."""

    def __init__(self, rngs: nnx.Rngs):
        linear = nnx.Linear(8, 12, rngs=rngs)
        self.up = nnx.LoRA(8, RANK, 12, base_module=linear, rngs=rngs)
        self.down = nnx.LoRALinear(12, 7, lora_rank=RANK, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


@pytest.mark.feature("Adapters attached by others")
def test_flaxs_own_lora_is_started_with_the_scale_folded_into_b():
    model = Wrapped(nnx.Rngs(0))
    before = values(model)
    truth = gradients(model, BATCHES, squared_error)  # B is zero still, so these are the plain model's
    adapted, report = lora_one.init(model, BATCHES, squared_error, lora_one.Config(rank=RANK, passes=2))
    assert adapted is model
    assert [layer.name for layer in report.layers] == ["down", "up"]
    for name, kernel, lora in (
        ("up", ("up", "base_module", "kernel"), model.up),
        ("down", ("down", "kernel"), model.down.lora),
    ):
        expected = S * step_of(truth[kernel].T, RANK)
        got = (np.asarray(lora.lora_a[...], np.float64) @ np.asarray(lora.lora_b[...], np.float64)).T
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), err_msg=name)
    after = values(model)
    kept = {path: value for path, value in before.items() if "lora_a" not in path and "lora_b" not in path}
    assert_same({path: after[path] for path in kept}, kept)


def test_an_adopted_adapter_keeps_its_rank_and_comes_back_after_an_error():
    model = Wrapped(nnx.Rngs(0))
    before = values(model)
    with pytest.raises(ModelError, match=r"the Config asks for 5: down has rank 3; up has rank 3"):
        lora_one.init(model, BATCHES, squared_error, lora_one.Config(rank=5))
    with pytest.raises(ModelError, match="the Config asks for targets"):
        lora_one.init(model, BATCHES, squared_error, lora_one.Config(rank=RANK, targets=["up"]))
    bad = [BATCHES[0], (BATCHES[1][0] * np.nan, BATCHES[1][1])]
    with pytest.raises(GradientError):
        lora_one.init(model, bad, squared_error, lora_one.Config(rank=RANK))
    assert_same(values(model), before)


def by_qwix(model: nnx.Module, **rule) -> nnx.Module:
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=6.0, **rule)
    return qwix.apply_lora_to_model(model, provider, BATCHES[0][0], rngs=nnx.Rngs(1))


def dequantised(adapted: nnx.Module) -> nnx.Module:
    """A plain Net with the weights that a quantised one computes with."""
    plain = Net(nnx.Rngs(0))
    for name in ("up", "fused", "mix", "down"):
        kernel = getattr(adapted, name).kernel
        if hasattr(kernel, "array"):
            array = jax.tree.map(lambda x: x.get_value() if isinstance(x, nnx.Variable) else x, kernel.array,
                                 is_leaf=lambda x: isinstance(x, nnx.Variable))  # fmt: skip
            getattr(plain, name).kernel.set_raw_value(qwix.dequantize(array).reshape(getattr(plain, name).kernel.shape))
    return plain


@pytest.mark.feature("Quantised base")
@pytest.mark.parametrize("weight_qtype", [None, "int8", "nf4"])
def test_qwix_models_are_started_on_the_weights_they_compute_with(weight_qtype):
    """Also where qwix fixes the width of the factors: more columns go in turns."""
    rule = {} if weight_qtype is None else {"weight_qtype": weight_qtype}
    adapted = by_qwix(Net(nnx.Rngs(0)), **rule)
    assert hasattr(adapted.up.kernel, "array") == (weight_qtype is not None)
    truth = gradients(dequantised(adapted), BATCHES, squared_error)
    before = {path: value for path, value in values(adapted).items() if "_lora_" not in path[-1]}
    config = lora_one.Config(rank=RANK, passes=2)
    started, report = lora_one.init(adapted, BATCHES, squared_error, config)
    assert started is adapted
    shapes = {"up": (8, 12), "fused": (12, 12), "mix": (12, 9), "down": (9, 7)}
    assert {layer.name for layer in report.layers} == set(shapes)
    for name, (ins, outs) in shapes.items():
        layer = getattr(adapted, name)
        a = np.asarray(layer.kernel_lora_a[...], np.float64).reshape(ins, RANK)
        b = np.asarray(layer.kernel_lora_b[...], np.float64).reshape(RANK, outs)
        expected = step_of(truth[name, "kernel"].reshape(ins, outs).T, RANK)
        np.testing.assert_allclose((a @ b).T, expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    after = values(adapted)
    assert_same({path: after[path] for path in before}, before)
    x = BATCHES[0][0]
    effective = dequantised(adapted)
    for name, (ins, outs) in shapes.items():  # alpha / r is the scale that init took
        layer, kernel = getattr(adapted, name), getattr(effective, name).kernel
        delta = layer.kernel_lora_a[...].reshape(ins, RANK) @ layer.kernel_lora_b[...].reshape(RANK, outs)
        kernel.set_raw_value(kernel[...] + 2.0 * delta.reshape(kernel.shape))
    np.testing.assert_allclose(adapted(x), effective(x), atol=1e-4)


def test_qwix_models_train_with_the_preconditioner(tmp_path):
    adapted = by_qwix(Net(nnx.Rngs(0)))
    lora_one.init(adapted, BATCHES, squared_error, lora_one.Config(rank=RANK, passes=2))
    tx = lora_one.optimizer(adapted, 1e-2, precondition=True, reg=1e-2)
    graphdef, lora, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    state = tx.init(lora)

    @jax.jit
    def step(lora, state):
        def loss(lora):
            return squared_error(nnx.merge(graphdef, lora, rest), BATCHES[0])

        value, grads = jax.value_and_grad(loss)(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    losses = []
    for _ in range(15):
        lora, state, value = step(lora, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    lora_one.save(adapted, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_lora_that_belongs_to_no_known_layer_is_an_error():
    model = mlp()
    model.up.extra = nnx.LoRAParam(jnp.ones((3, 3)))
    with pytest.raises(ModelError, match=r"up: nnx\.LoRAParam 'extra' belongs to no layer that is known"):
        lora_one.init(model, BATCHES, squared_error, lora_one.Config(rank=2))
