"""Both sides of each gradient in one pass, against G V and G^T U of exact gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen, nnx

import lora_one
from lora_one.backends.jax import LinenModel, PytreeModel, open_session
from lora_one.core.sides import Sides
from tests.backends.jax.models import (
    assert_same,
    counted_compilations,
    gradients,
    mlp,
    regression,
    squared_error,
    values,
)

BATCHES = regression(2)
CONFIG = lora_one.Config(rank=3)
P, Q = 5, 4  # numbers of right and left columns


def random_sides(session, but: str = "") -> dict[str, Sides]:
    rng = np.random.default_rng(1)
    return {
        layer.name: Sides(
            jnp.asarray(rng.standard_normal((layer.in_features, P)), jnp.float32),
            jnp.asarray(rng.standard_normal((layer.out_features, Q)), jnp.float32),
        )
        for layer in session.layers
        if layer.name != but
    }


def assert_products(session, truth: dict[str, np.ndarray], rtol=2e-5, but: str = "") -> None:
    """Check a pass against each layer's G, (out, in); `but` is a layer that gets no sides."""
    sides = random_sides(session, but)
    result, products = session.sides_pass(sides)
    assert result.batches == len(BATCHES)
    assert products.keys() == truth.keys() - {but}
    for name, product in products.items():
        for got, g, side in (
            (product.g_right, truth[name], sides[name].right),
            (product.g_left, truth[name].T, sides[name].left),
        ):
            expected = g @ np.asarray(side, np.float64)
            np.testing.assert_allclose(got, expected, atol=rtol * np.abs(expected).max(), err_msg=name)


def mlp_gradients() -> dict[str, np.ndarray]:
    """`shared` is called twice: sums over calls are sums of gradients."""
    truth = gradients(mlp(), BATCHES, squared_error)
    shapes = {"up": (8, 12), "shared": (12, 12), "fused": (12, 24), "down": (9, 7)}
    matrices = {name: truth[name, "kernel"].reshape(shape).T for name, shape in shapes.items()}
    heads = truth["mix", "kernel"]  # "bcnh,cnhd->bd"
    return {**matrices, "mix": heads.reshape(24, 9).T}


def test_nnx_layers_and_a_layer_that_is_left_out():
    model = mlp()
    before = values(model)
    with open_session(model, BATCHES, squared_error, CONFIG) as session:
        assert_products(session, mlp_gradients())
        assert_products(session, mlp_gradients(), but="fused")
        kept = values(model)
    assert_same({path: kept[path] for path in before}, before)


def test_every_further_pass_of_equal_width_is_compiled_already():
    traces = []

    def loss(model, batch):
        traces.append(None)
        return squared_error(model, batch)

    with open_session(mlp(), BATCHES, loss, CONFIG) as session:
        session.sides_pass(random_sides(session))
        sides = random_sides(session)
        with counted_compilations() as compiled:
            session.sides_pass(sides)
        assert len(traces) == session.attached.gradient_function.step._cache_size() == 1
    assert compiled == []


class Layer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + jnp.tanh(linen.Dense(8, use_bias=False, name="d")(x)), None


def test_stacks_of_linen_and_nnx():
    scanned = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    batches = regression(2, outs=8)
    variables = scanned.init(jax.random.key(0), batches[0][0], None)
    truth = [
        jax.grad(lambda p, b: squared_error(lambda x: scanned.apply({"params": p}, x, None)[0], b))(
            variables["params"], b
        )
        for b in batches
    ]
    g = np.mean([np.asarray(t["d"]["kernel"], np.float64) for t in truth], axis=0)

    def loss(model, batch):
        return squared_error(lambda x: model(x, None)[0], batch)

    with open_session(LinenModel(scanned, variables), batches, loss, CONFIG) as session:
        assert_products(session, {f"d.{i}": g[i].T for i in range(3)})
        assert_products(session, {f"d.{i}": g[i].T for i in range(3)}, but="d.1")


def test_pytrees():
    rng = np.random.default_rng(0)
    params = {"w": {"kernel": jnp.asarray(rng.standard_normal((8, 7)), jnp.float32)}}

    def loss(params, batch):
        return squared_error(lambda x: jnp.tanh(x) @ params["w"]["kernel"], batch)

    g = np.mean([np.asarray(jax.grad(loss)(params, batch)["w"]["kernel"], np.float64) for batch in BATCHES], axis=0)
    with open_session(PytreeModel(params), BATCHES, loss, CONFIG) as session:
        assert_products(session, {"w.kernel": g.T})


class Adopted(nnx.Module):
    """The LoRA layers of Flax, whose factors have any width and no scale."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.LoRA(8, 3, 12, base_module=nnx.Linear(8, 12, rngs=rngs), rngs=rngs)
        self.down = nnx.LoRALinear(12, 7, lora_rank=3, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def test_adopted_layers():
    model = Adopted()
    truth = gradients(model, BATCHES, squared_error)  # B is zero still, so these are the plain model's
    with open_session(model, BATCHES, squared_error, CONFIG) as session:
        assert_products(session, {"up": truth["up", "base_module", "kernel"].T, "down": truth["down", "kernel"].T})


class Plain(nnx.Module):
    """Layers that qwix can adapt."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.fused = nnx.Linear(8, 12, rngs=rngs), nnx.LinearGeneral(12, (3, 4), rngs=rngs)
        self.down = nnx.Einsum("bnh,nhd->bd", (3, 4, 7), rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.fused(jnp.tanh(self.up(x)))))


@pytest.mark.parametrize("rank", [3, 5, 16])
def test_layers_of_a_fixed_width_take_columns_in_turns(rank):
    """9 columns at a width of 3 are whole turns; at 5 the second turn holds columns of both sides; 16 are enough."""
    truth = gradients(Plain(), BATCHES, squared_error)
    provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=2.0 * rank)
    model = qwix.apply_lora_to_model(Plain(), provider, BATCHES[0][0], rngs=nnx.Rngs(1))
    shapes = {"up": (8, 12), "fused": (12, 12), "down": (12, 7)}
    with open_session(model, BATCHES, squared_error, lora_one.Config(rank=rank)) as session:
        assert_products(session, {name: truth[name, "kernel"].reshape(shape).T for name, shape in shapes.items()})


def test_a_layer_that_no_gradient_reaches_has_zero_products():
    model = nnx.Sequential(nnx.Linear(8, 7, rngs=nnx.Rngs(0)), nnx.Linear(8, 7, rngs=nnx.Rngs(1)))

    def loss(model, batch):
        return squared_error(model.layers[0], batch)

    g = gradients(model, BATCHES, loss)["layers", 0, "kernel"].T
    with open_session(model, BATCHES, loss, CONFIG) as session:
        assert_products(session, {"layers.0": g, "layers.1": np.zeros_like(g)})


@pytest.mark.parametrize("scale", [1e-7, 3e4])
def test_float16_products_do_not_have_the_losss_scale(scale):
    model, wide = mlp("float16"), mlp()
    for name in ("up", "down"):
        getattr(wide, name).kernel[...] = getattr(model, name).kernel[...].astype("float32")
    del model.fused, model.mix, wide.fused, wide.mix

    def loss(model, batch):
        x, y = batch
        return scale * jnp.mean((model.down(jnp.tanh(model.up(x))[:, :9]) - y) ** 2)

    truth = gradients(wide, BATCHES, lambda model, batch: loss(model, batch) / scale)
    config = lora_one.Config(rank=3, targets=["up", "down"])
    with open_session(model, BATCHES, loss, config) as session:
        assert_products(session, {name: scale * truth[name, "kernel"].T for name in ("up", "down")}, rtol=5e-3)
