"""Ranks by the gradients' spectra on JAX: NNX modules, Linen modules, trees and stacks; files; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import linen, nnx

import lora_one
from lora_one.backends.jax import LinenModel, PytreeModel
from lora_one.errors import ConfigError, ModelError
from tests.backends import adaptive
from tests.backends.torch import test_adaptive_rank as on_torch


class Net(nnx.Module):
    def __init__(self) -> None:
        for name, weight in adaptive.weights().items():
            layer = nnx.Linear(weight.shape[1], weight.shape[0], use_bias=False, rngs=nnx.Rngs(0))
            layer.kernel.set_value(jnp.asarray(weight.T))
            setattr(self, name, layer)

    def __call__(self, x, z):
        return self.out(jnp.tanh(self.wide(x) + self.narrow(z)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, z):
        def dense(name):
            return linen.Dense(adaptive.SIZES[name][0], use_bias=False, name=name)

        return dense("out")(jnp.tanh(dense("wide")(x) + dense("narrow")(z)))


def kernels():
    return {name: {"kernel": jnp.asarray(weight.T)} for name, weight in adaptive.weights().items()}


def on_tree(params, x, z):
    return jnp.tanh(x @ params["wide"]["kernel"] + z @ params["narrow"]["kernel"]) @ params["out"]["kernel"]


def batches():
    return [tuple(map(jnp.asarray, batch)) for batch in adaptive.batches()]


def squared_error(model, batch):
    x, z, target = batch
    y = on_tree(model, x, z) if isinstance(model, dict) else model(x, z)
    return jnp.mean((y - target) ** 2)


MODELS = {
    "nnx": Net,
    "linen": lambda: LinenModel(LinenNet(), {"params": kernels()}),
    "tree": lambda: PytreeModel(kernels()),
}


def started(make, **options):
    config = {**adaptive.CONFIG.to_dict(), **options}
    if make is MODELS["tree"]:
        config["targets"] = [f"{name}.kernel" for name in adaptive.SIZES]
    return lora_one.init(make(), batches(), squared_error, lora_one.Config(**config))


def pairs_of(model):
    if isinstance(model, nnx.Module):
        factors = {n: [getattr(getattr(model, n), f"kernel_lora_{side}")[...] for side in "ab"] for n in adaptive.SIZES}
    else:
        factors = {name.split(".")[0]: [x[f"kernel_lora_{side}"] for side in "ab"] for name, x in model.lora.items()}
        assert model.scaling == pytest.approx(adaptive.CONFIG.scaling)
    return {name: tuple(np.asarray(x, float).T for x in factors[name]) for name in adaptive.SIZES}


def test_an_exact_start_has_the_ranks_too_and_gamma_auto_tries_it_at_these():
    model, report = started(Net, gradient="exact", gamma="auto")
    assert {layer.name: layer.rank for layer in report.layers} == adaptive.ranks()
    assert {name: len(a) for name, (a, _) in pairs_of(model).items()} == adaptive.ranks()
    assert report.gamma_trials[-1].loss <= report.base_loss


@pytest.mark.feature("Adaptive rank")
@pytest.mark.parametrize("name", MODELS)
def test_a_start_has_the_ranks_that_hold_most_energy_and_training_files_and_merging_keep_them(name, tmp_path):
    make = MODELS[name]
    model, report = started(make)
    adaptive.assert_started(pairs_of(model))
    assert {layer.name.split(".")[0]: layer.rank for layer in report.layers} == adaptive.ranks()
    with pytest.raises(ModelError, match="rank_max"):
        lora_one.init(model, batches(), squared_error, lora_one.Config(rank_max=8))
    tx = lora_one.optimizer(model, 1e-2, precondition=True, reg=1e-2)
    if name == "nnx":
        gradients = nnx.grad(squared_error, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batches()[0])
        nnx.Optimizer(model, tx, wrt=nnx.LoRAParam).update(model, gradients)
    else:
        effective = (lambda m: m.effective()) if name == "tree" else (lambda m: m)
        gradients = jax.grad(lambda lora: squared_error(effective(model.replace(lora=lora)), batches()[0]))(model.lora)
        updates, _ = tx.update(gradients, tx.init(model.lora), model.lora)
        model = model.replace(lora=jax.tree.map(jnp.add, model.lora, updates))

    def outputs(m):
        x, z, _ = batches()[0]
        return np.asarray(on_tree(m.effective(), x, z) if name == "tree" else m(x, z))

    lora_one.save(model, tmp_path, report)
    expected = outputs(model)
    np.testing.assert_array_equal(outputs(lora_one.load(make(), tmp_path)), expected)
    if name == "nnx":
        opened = peft.PeftModel.from_pretrained(on_torch.Net(), tmp_path)
        torch.testing.assert_close(on_torch.outputs(opened), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs(lora_one.merge(model)), expected, atol=1e-5)


class Stacked(nnx.Module):
    """Three layers in one array, and one beside them whose input has rank 1."""

    def __init__(self) -> None:
        self.blocks = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(nnx.Rngs(0).fork(split=3))
        self.first = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def __call__(self, x, z):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(h, block):
            return h + jnp.tanh(block(h))

        return run(x + self.first(z), self.blocks)


def test_layers_stacked_in_one_array_have_one_rank():
    rng = np.random.default_rng(0)
    x, z, target = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((32, 8), (32, 1), (32, 8)))
    config = lora_one.Config(rank=4, rank_max=8, targets=["blocks", "first"])
    model, report = lora_one.init(Stacked(), [(x, z * jnp.ones(8), target)], squared_error, config)
    ranks = {layer.name: layer.rank for layer in report.layers}
    # What the layer with a gradient of rank 1 saves, 3 * 16 parameters, pays for one more rank of the stack.
    assert ranks == {"blocks.0": 5, "blocks.1": 5, "blocks.2": 5, "first": 1}
    assert (model.blocks.kernel_lora_a.shape, model.blocks.kernel_lora_b.shape) == ((3, 8, 5), (3, 5, 8))


def test_without_batches_there_is_nothing_to_go_by():
    with pytest.raises(ConfigError, match="no gradient at hand for rank_max=6"):
        lora_one.init(Net(), config=adaptive.CONFIG)
