import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import lora_one
from lora_one.backends.jax import LinenModel, PytreeModel
from lora_one.errors import BackendError, ConfigError, ModelError
from tests.backends.jax.models import regression, squared_error, step_of

BATCHES = regression(2)
CONFIG = lora_one.Config(rank=3, passes=2)  # as wide as the layers: two passes see all there is


class Layer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + jnp.tanh(linen.Dense(12, name="dense")(x)), None


class Network(linen.Module):
    """Every kind of layer, a scanned stack, and rematerialisation."""

    @linen.compact
    def __call__(self, x):
        x = linen.remat(linen.Dense)(12, name="up")(x)
        stack = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="stack")(x, None)
        q = linen.DenseGeneral((3, 4), name="heads")(x)
        y = linen.DenseGeneral(9, axis=(-2, -1), name="join")(jnp.tanh(q))
        y = y + linen.Einsum((12, 9), "bi,io->bo", name="ein")(x)
        return linen.Dense(7, name="down")(jnp.tanh(y))


LAYERS = {"up": (8, 12), "stack.dense": (12, 12), "heads": (12, 12), "join": (12, 9), "ein": (12, 9), "down": (9, 7)}


@pytest.fixture(scope="module")
def linen_model():
    return LinenModel(Network(), Network().init(jax.random.key(0), BATCHES[0][0]))


@pytest.fixture(scope="module")
def started(linen_model):
    return lora_one.init(linen_model, BATCHES, squared_error, CONFIG)


def mean_gradient(loss_of, params):
    grads = [jax.grad(loss_of)(params, batch) for batch in BATCHES]
    return jax.tree.map(lambda *g: np.mean([np.asarray(x, np.float64) for x in g], axis=0), *grads)


def test_linen_factors_are_one_gradient_step(linen_model, started):
    model, report = started
    truth = mean_gradient(lambda p, b: squared_error(lambda x: Network().apply({"params": p}, x), b),
                          linen_model.variables["params"])  # fmt: skip
    assert len(report.layers) == len(LAYERS) + 1
    for name, (ins, outs) in LAYERS.items():
        node = truth
        for part in name.split("."):
            node = node[part]
        a, b = (np.asarray(model.lora[name][f"kernel_lora_{side}"], np.float64) for side in "ab")
        n = 2 if name.startswith("stack") else 1
        for kernel, x, y in zip(
            node["kernel"].reshape(n, ins, outs), a.reshape(n, ins, 3), b.reshape(n, 3, outs), strict=True
        ):
            expected = step_of(kernel.T, 3)
            np.testing.assert_allclose((x @ y).T, expected, atol=3e-5 * np.abs(expected).max(), err_msg=name)


def test_batches_of_a_linen_model_may_be_a_generator(linen_model):
    """The layers are seen on the first batch, and it counts."""
    exact = lora_one.Config(rank=3, gradient="exact")
    _, report = lora_one.init(linen_model, iter(BATCHES), squared_error, exact)
    expected = np.mean([squared_error(linen_model, batch) for batch in BATCHES])
    assert report.base_loss == pytest.approx(expected, rel=1e-6)


def test_linen_base_stays_merge_keeps_the_function_and_lora_trains(linen_model, started):
    model, _ = started
    x = BATCHES[0][0]
    assert model.variables is linen_model.variables
    y = model(x)
    assert float(np.abs(y - linen_model(x)).max()) > 1e-3
    merged = lora_one.merge(model)
    np.testing.assert_allclose(Network().apply(merged.variables, x), y, atol=1e-5)
    assert not merged.lora

    tx = lora_one.optimizer(model, 1e-2, precondition=True, reg=1e-2)
    lora, state = model.lora, tx.init(model.lora)

    @jax.jit
    def step(lora, state, batch):
        loss, grads = jax.value_and_grad(lambda p: squared_error(model.replace(lora=p), batch))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    losses = []
    for _ in range(10):
        lora, state, loss = step(lora, state, BATCHES[0])
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


class EquinoxNet(equinox.Module):
    table: equinox.nn.Embedding
    up: equinox.nn.Linear
    down: equinox.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.table = equinox.nn.Embedding(5, 12, key=keys[0])
        self.up = equinox.nn.Linear(8, 12, key=keys[1])
        self.down = equinox.nn.Linear(12, 7, key=keys[2])

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x) + self.table(jnp.array(2))))


def equinox_loss(model, batch):
    return squared_error(jax.vmap(model), batch)


def test_equinox_modules_by_substitution():
    net = EquinoxNet(jax.random.key(0))
    model, report = lora_one.init(PytreeModel(net), BATCHES, equinox_loss, CONFIG)
    assert [layer.name for layer in report.layers] == ["up.weight", "down.weight"]
    truth = mean_gradient(equinox_loss, net)
    for name in ("up", "down"):
        factors = model.lora[f"{name}.weight"]
        a, b = (np.asarray(factors[f"weight_lora_{side}"], np.float64) for side in "ab")
        expected = step_of(getattr(truth, name).weight, 3)
        np.testing.assert_allclose((a @ b).T, expected, atol=2e-5 * np.abs(expected).max())
        effective = getattr(model.effective(), name).weight
        weight = getattr(net, name).weight + model.scaling * (a @ b).T
        np.testing.assert_allclose(effective, weight, atol=1e-5)
    assert isinstance(lora_one.merge(model).params, EquinoxNet)


def test_a_plain_dictionary_with_more_axes_needs_a_word():
    rng = np.random.default_rng(0)
    params = {"in": {"kernel": rng.standard_normal((8, 2, 6)).astype("f")}, "out": {"kernel": np.ones((12, 7), "f")}}

    def loss(p, batch):
        h = jnp.tanh(jnp.einsum("bi,inh->bnh", batch[0], p["in"]["kernel"]))
        return jnp.mean((h.reshape(len(h), 12) @ p["out"]["kernel"] - batch[1]) ** 2)

    model, report = lora_one.init(PytreeModel(params), BATCHES, loss, CONFIG)
    assert [layer.name for layer in report.layers] == ["out.kernel"]
    model, report = lora_one.init(PytreeModel(params, axes={r"in\.kernel": "ioo"}), BATCHES, loss, CONFIG)
    assert model.lora["in.kernel"]["kernel_lora_b"].shape == (3, 2, 6)
    expected = step_of(mean_gradient(loss, params)["in"]["kernel"].reshape(8, 12).T, 3)
    got = layout_product(model, "in.kernel")
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
    with pytest.raises(ModelError, match=r"in.kernel: axes must be one of i, o, s for each of \(8, 2, 6\), got 'io'"):
        lora_one.init(PytreeModel(params, axes={r"in\.kernel": "io"}), BATCHES, loss, CONFIG)


def layout_product(model, name):
    a, b = (np.asarray(model.lora[name][f"kernel_lora_{side}"], np.float64) for side in "ab")
    return (a.reshape(-1, 3) @ b.reshape(3, -1)).T


def test_what_cannot_be():
    params = {"kernel": np.ones((8, 7))}
    with pytest.raises(ConfigError, match="kernel is float64 but JAX's x64 is off"):
        lora_one.init(PytreeModel(params), BATCHES, squared_error, CONFIG)
    with pytest.raises(ModelError, match="kernel: must be floating, got int32"):
        lora_one.init(PytreeModel({"kernel": np.ones((8, 7), np.int32)}), BATCHES, squared_error, CONFIG)
    network = Network()
    with pytest.raises(ModelError, match="wrapped in LinenModel or PytreeModel"):
        lora_one.init(network, BATCHES, squared_error, CONFIG)
    with pytest.raises(BackendError, match="model must be of one of the frameworks"):
        lora_one.init(params, BATCHES, squared_error, CONFIG)


@pytest.mark.parametrize("params", [{"kernel": np.ones((8, 7), "f")}, EquinoxNet(jax.random.key(0)), [np.ones(3)]])
def test_a_bare_pytree_is_told_how_to_go_in(params):
    for call in (lambda: lora_one.init(params, BATCHES, squared_error), lambda: lora_one.merge(params)):
        with pytest.raises(BackendError, match=r"lora_one\.backends\.jax\.PytreeModel\(params\)"):
            call()
    with pytest.raises(BackendError) as caught:
        lora_one.init("a string", BATCHES, squared_error)
    assert "PytreeModel" not in str(caught.value)
