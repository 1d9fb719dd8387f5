"""Models that are shapes alone, as for a sharded restore, and calls under a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_one
from lora_one.backends.jax import attach_plain
from lora_one.errors import ModelError

CONFIG = lora_one.Config(rank=2)
X = np.random.default_rng(0).standard_normal((3, 8)).astype("f")


class Two(nnx.Module):
    def __init__(self):
        self.a, self.b = nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(an adapted model that adds something, its folder)."""
    model = attach_plain(Two(), CONFIG)
    model.a.kernel_lora_b[...] = jnp.ones((2, 6))
    folder = tmp_path_factory.mktemp("adapter")
    lora_one.save(model, folder)
    return model, folder


def test_shapes_of_an_adapted_model_are_had_without_arrays_and_take_a_restored_state(saved):
    model, folder = saved
    state = nnx.state(model)
    for make in (lambda: attach_plain(Two(), CONFIG), lambda: lora_one.load(Two(), folder)):
        abstract = nnx.eval_shape(make)
        leaves = jax.tree.leaves(nnx.state(abstract, nnx.LoRAParam))
        assert [leaf.shape for leaf in leaves] == [(8, 2), (2, 6), (6, 2), (2, 5)]
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        nnx.update(abstract, state)
        np.testing.assert_array_equal(abstract(X), model(X))


def test_an_adapter_is_loaded_onto_shapes_and_the_base_comes_later(saved):
    model, folder = saved
    loaded = lora_one.load(nnx.eval_shape(Two), folder)
    np.testing.assert_array_equal(loaded.a.kernel_lora_a[...], model.a.kernel_lora_a[...])
    nnx.update(loaded, nnx.state(Two()))
    np.testing.assert_array_equal(loaded(X), model(X))


def test_load_and_merge_inside_jit(saved):
    model, folder = saved
    np.testing.assert_allclose(nnx.jit(lambda: lora_one.load(Two(), folder))()(X), model(X), atol=1e-6)
    graphdef, state = nnx.split(Two())
    traced = jax.jit(lambda state: lora_one.load(nnx.merge(graphdef, state), folder)(X))
    np.testing.assert_allclose(traced(state), model(X), atol=1e-6)
    merged = nnx.jit(lambda: lora_one.merge(lora_one.load(Two(), folder)))()
    np.testing.assert_allclose(merged(X), model(X), atol=1e-5)


def test_what_needs_weights_says_so(saved, tmp_path):
    _, folder = saved

    def init(model):
        return lora_one.init(model, [X], lambda m, x: jnp.mean(m(x) ** 2), CONFIG)

    abstract = nnx.eval_shape(Two)
    with pytest.raises(ModelError, match="init needs the model's weights, got shapes alone"):
        init(abstract)
    assert type(abstract.a) is nnx.Linear
    with pytest.raises(ModelError, match="init needs the model's weights and cannot be traced"):
        nnx.eval_shape(lambda: init(Two())[0])
    adapted = lora_one.load(abstract, folder)
    with pytest.raises(ModelError, match="merge needs the model's weights, got shapes alone"):
        lora_one.merge(adapted)
    with pytest.raises(ModelError, match="save needs the model's weights, got shapes alone"):
        lora_one.save(nnx.eval_shape(lambda: lora_one.load(Two(), folder)), tmp_path)
