"""Mixtures of experts: one parameter for all experts, layers under nnx.vmap, and an einsum over the experts."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

import lora_one
from lora_one.backends.jax import PytreeModel, register_layer
from lora_one.backends.jax.layout import plain_layout
from lora_one.backends.jax.nnx.layers import factors_of
from lora_one.errors import ZeroGradientWarning
from tests.backends.jax.models import gradients, squared_error, step_of

RNG = np.random.default_rng(0)
SIZES = (5, 3, 0, 4)  # tokens of each expert: none reaches the third
X, Y = RNG.standard_normal((12, 6), np.float32), RNG.standard_normal((12, 6), np.float32)
CONFIG = lora_one.Config(rank=2, gradient="exact", gamma=4.0, targets=r"experts\..*")


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape, np.float32))


class Experts(nnx.Module):
    """Tokens sorted by expert, as dropless mixtures multiply them."""

    def __init__(self):
        self.wi, self.wo = nnx.Param(normal(4, 6, 5)), nnx.Param(normal(4, 5, 6))

    def __call__(self, x):
        sizes = jnp.asarray(SIZES)
        return jax.lax.ragged_dot(jnp.tanh(jax.lax.ragged_dot(x, self.wi[...], sizes)), self.wo[...], sizes)


class Mixture(nnx.Module):
    def __init__(self):
        self.router = nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(0))
        self.experts = Experts()

    def __call__(self, x):
        return self.experts(jnp.tanh(self.router(x)))


class Twin(torch.nn.Module):
    """The same in PyTorch, with a linear layer an expert."""

    def __init__(self, params):
        super().__init__()
        self.router = torch.nn.Linear(6, 6, bias=False)
        self.router.weight.data = torch.tensor(np.asarray(params["router"]["kernel"]).T)
        self.experts = torch.nn.ModuleDict()
        for name, kernels in params["experts"].items():
            self.experts[name] = torch.nn.ModuleList(torch.nn.Linear(*k.shape, bias=False) for k in kernels)
            for linear, kernel in zip(self.experts[name], kernels, strict=True):
                linear.weight.data = torch.tensor(np.asarray(kernel).T)

    def forward(self, x):
        parts = torch.split(torch.tanh(self.router(x)), SIZES)
        experts = zip(parts, self.experts["wi"], self.experts["wo"], strict=True)
        return torch.cat([wo(torch.tanh(wi(part))) for part, wi, wo in experts])


@pytest.mark.feature("Experts as one parameter")
@pytest.mark.feature("Experts")
def test_each_expert_of_one_parameter_gets_its_own_pair(tmp_path):
    graphdef, state, rest = nnx.split(Mixture(), nnx.Param, ...)
    params = nnx.to_pure_dict(state)

    def loss_fn(params, batch):
        return squared_error(nnx.merge(graphdef, params, rest), batch)

    def opened():
        return PytreeModel(params, axes={r"experts\..*": "sio"})

    def output(model):
        return nnx.merge(graphdef, model.effective(), rest)(X)

    with pytest.warns(ZeroGradientWarning, match=r"experts\.wi\.2.*experts\.wo\.2"):
        model, report = lora_one.init(opened(), [(X, Y)], loss_fn, CONFIG)
    assert [layer.name for layer in report.layers] == [f"experts.{w}.{i}" for w in ("wi", "wo") for i in range(4)]
    truth = gradients(Mixture(), [(X, Y)], squared_error)
    merged = lora_one.merge(model).params
    np.testing.assert_array_equal(merged["router"]["kernel"], params["router"]["kernel"])
    for name in ("wi", "wo"):
        change = np.asarray(merged["experts"][name] - params["experts"][name], np.float64)
        for i, g in enumerate(truth["experts", name]):
            expected = 0 * g if i == 2 else CONFIG.scaling * step_of(g.T, 2, gamma=4.0).T
            np.testing.assert_allclose(change[i], expected, atol=1e-4 * np.abs(change).max(), err_msg=f"{name} {i}")
    lora_one.save(model, tmp_path, report)
    np.testing.assert_allclose(output(lora_one.load(opened(), tmp_path)), output(model), atol=1e-5)
    twin = peft.PeftModel.from_pretrained(Twin(params), tmp_path)
    with torch.no_grad():
        np.testing.assert_allclose(twin(torch.tensor(X)), output(model), atol=1e-5)
    # The optimizer takes one pair an expert too: an expert that nothing reaches stays as it is.
    tx = lora_one.optimizer(model, 1e-2, precondition=True)
    grads = jax.grad(lambda lora: loss_fn(model.replace(lora=lora).effective(), (X, Y)))(model.lora)
    updates, _ = jax.jit(tx.update)(grads, tx.init(model.lora), model.lora)
    sizes = jnp.abs(updates["experts.wi"]["wi_lora_b"]).max((1, 2))
    np.testing.assert_allclose(sizes, [1e-2, 1e-2, 0, 1e-2], rtol=0.02)


class Ragged(nnx.Module):
    """One parameter for all experts, in a module of its own."""

    def __init__(self, *shape):
        self.weight = nnx.Param(normal(*shape))

    def __call__(self, x):
        return jax.lax.ragged_dot(x, self.weight[...], jnp.asarray(SIZES))


class LoraRagged(Ragged):
    def __call__(self, x):
        a, b, scale = factors_of(self, "weight")
        sizes = jnp.asarray(SIZES)
        return super().__call__(x) + scale * jax.lax.ragged_dot(jax.lax.ragged_dot(x, a, sizes), b, sizes)


@pytest.mark.feature("Experts as one parameter")
def test_a_module_of_experts_can_be_registered(tmp_path):
    """Then no gradient of a whole weight is needed."""
    register_layer(Ragged, LoraRagged, lambda layer: plain_layout(layer.weight.shape, 1, 1), "weight")

    def make():
        return nnx.Sequential(Ragged(4, 6, 5), jnp.tanh, Ragged(4, 5, 6))

    truth = gradients(make(), [(X, Y)], squared_error)
    config = lora_one.Config(rank=2, gradient="exact", gamma=4.0)
    with pytest.warns(ZeroGradientWarning, match=r"layers\.0\.2.*layers\.2\.2"):
        model, report = lora_one.init(make(), [(X, Y)], squared_error, config)
    y = model(X)
    lora_one.save(model, tmp_path, report)
    np.testing.assert_allclose(lora_one.load(make(), tmp_path)(X), y, atol=1e-5)
    merged = lora_one.merge(model)
    np.testing.assert_allclose(merged(X), y, atol=1e-5)
    for place in (0, 2):
        change = merged.layers[place].weight[...] - make().layers[place].weight[...]
        for i, g in enumerate(truth["layers", place, "weight"]):
            expected = 0 * g if i == 2 else config.scaling * step_of(g.T, 2, gamma=4.0).T
            np.testing.assert_allclose(change[i], expected, atol=1e-4 * np.abs(change).max(), err_msg=f"{place} {i}")


class Mapped(nnx.Module):
    """Layers made by nnx.vmap, and an nnx.Einsum over the experts; each expert has its own rows."""

    def __init__(self):
        make = nnx.vmap(lambda key: nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(key)))
        self.up = make(jax.random.split(jax.random.key(0), 3))
        self.down = nnx.Einsum("ecd,edf->ecf", (3, 5, 6), rngs=nnx.Rngs(1))

    def __call__(self, x):
        x = x.reshape(3, 4, 6) * jnp.array([1.0, 0.0, 1.0])[:, None, None]  # nothing of the second one comes out
        h = jnp.tanh(nnx.vmap(lambda expert, x: expert(x))(self.up, x))
        return self.down(h).reshape(12, 6)


@pytest.mark.feature("Experts")
def test_experts_under_vmap_and_in_an_einsum_get_a_pair_each():
    truth = gradients(Mapped(), [(X, Y)], squared_error)
    with pytest.warns(ZeroGradientWarning, match=r"up\.1"):
        model, report = lora_one.init(
            Mapped(), [(X, Y)], squared_error, lora_one.Config(rank=2, gradient="exact", gamma=4.0)
        )
    assert [layer.name for layer in report.layers] == [f"{name}.{i}" for name in ("down", "up") for i in range(3)]
    for name in ("up", "down"):
        layer = getattr(model, name)
        for i in (0, 2):
            expected = step_of(truth[name, "kernel"][i].T, 2, gamma=4.0).T
            got = layer.kernel_lora_a[i] @ layer.kernel_lora_b[i]
            np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), err_msg=f"{name} {i}")
        np.testing.assert_array_equal(layer.kernel_lora_b[1], 0.0)
