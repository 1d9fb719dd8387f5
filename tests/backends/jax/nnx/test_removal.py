"""LoRA merged into an NNX model or taken out of it: of every kind, and where kernels are shared."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_one
from lora_one.backends.jax import attach_plain, unload
from lora_one.errors import ModelError
from tests.backends.jax.models import assert_same, values
from tests.backends.jax.nnx.test_adopt import BATCHES, RANK, Net, Wrapped, by_qwix

X = BATCHES[0][0]


def with_numbers(model):
    """The model with factors that add something."""
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        variable.set_raw_value(jnp.asarray(rng.standard_normal(variable.shape), variable.dtype))
    return model


@pytest.mark.feature("Merging adopted layers")
def test_flaxs_own_lora_is_merged_and_taken_out():
    model = with_numbers(Wrapped(nnx.Rngs(0)))
    y = model(X)
    base = nnx.clone(model)
    merged = lora_one.merge(model)
    assert merged is model
    assert type(model.up) is type(model.down) is nnx.Linear
    assert set(values(model)) == {("up", "kernel"), ("up", "bias"), ("down", "kernel"), ("down", "bias")}
    np.testing.assert_allclose(model(X), y, atol=1e-5 * np.abs(y).max())
    plain = unload(base)
    expected = jnp.tanh(X @ base.up.kernel[...]) @ base.down.kernel[...]
    np.testing.assert_allclose(plain(X), expected, atol=1e-5)
    assert float(np.abs(plain(X) - y).max()) > 0.1


@pytest.mark.feature("Merging adopted layers")
@pytest.mark.parametrize("weight_qtype", [None, "int8"])
def test_qwix_lora_is_merged_with_its_own_scale_and_stays_away(weight_qtype):
    """Quantised kernels become float ones: what they stand for, and the adapter."""
    model = with_numbers(by_qwix(Net(nnx.Rngs(0)), **({"weight_qtype": weight_qtype} if weight_qtype else {})))
    y = model(X)
    merged = lora_one.merge(model)
    np.testing.assert_allclose(merged(X), y, atol=1e-5 * np.abs(y).max())
    assert type(merged) is Net
    assert values(merged).keys() == values(Net(nnx.Rngs(0))).keys()


def test_what_cannot_be_merged_says_so_and_stays():
    model = with_numbers(by_qwix(Net(nnx.Rngs(0)), weight_qtype="int8"))
    y = model(X)
    with pytest.raises(ModelError, match=r"up: its kernel is quantised, .*: merge makes it float"):
        unload(model)
    np.testing.assert_array_equal(model(X), y)
    alone = nnx.Sequential(nnx.LoRA(8, RANK, 8, rngs=nnx.Rngs(0)))
    before = values(alone)
    with pytest.raises(ModelError, match="it wraps no layer"):
        lora_one.merge(alone)
    assert_same(values(alone), before)
    with pytest.raises(ModelError, match="there is no LoRA in this Net"):
        lora_one.merge(Net(nnx.Rngs(0)))


def test_flaxs_lora_around_other_linear_layers_is_merged():
    rngs = nnx.Rngs(0)
    general, einsum = nnx.LinearGeneral(8, 12, rngs=rngs), nnx.Einsum("bi,oi->bo", (7, 12), (7,), rngs=rngs)
    lora = [nnx.LoRA(8, 2, 12, base_module=general, rngs=rngs), nnx.LoRA(12, 2, 7, base_module=einsum, rngs=rngs)]
    model = with_numbers(nnx.Sequential(*lora))
    y = model(X)
    merged = lora_one.merge(model)
    assert [type(layer) for layer in merged.layers] == [nnx.LinearGeneral, nnx.Einsum]
    np.testing.assert_allclose(merged(X), y, atol=1e-5 * np.abs(y).max())


class Tied(nnx.Module):
    """Two layers that have one kernel, one of them with LoRA; and an embedding that is the output layer too."""

    def __init__(self):
        self.embed = nnx.Embed(7, 8, rngs=nnx.Rngs(0))
        self.one, self.two = nnx.Linear(8, 8, rngs=nnx.Rngs(1)), nnx.Linear(8, 8, rngs=nnx.Rngs(2))
        self.two.kernel = self.one.kernel

    def __call__(self, tokens):
        return self.embed.attend(self.two(jnp.tanh(self.one(self.embed(tokens)))))


@pytest.mark.parametrize("targets", [["two"], ["one", "two"]])
def test_a_shared_kernel_is_untied_where_lora_is_merged(targets):
    model = with_numbers(attach_plain(Tied(), lora_one.Config(rank=2, targets=targets)))
    table, kernel = np.asarray(model.embed.embedding[...]), np.asarray(model.one.kernel[...])
    tokens = np.arange(7)
    y = model(tokens)
    lora_one.merge(model)
    np.testing.assert_allclose(model(tokens), y, atol=1e-4 * np.abs(y).max())
    np.testing.assert_array_equal(model.embed.embedding[...], table)
    assert np.array_equal(model.one.kernel[...], kernel) == ("one" not in targets)
    assert not np.array_equal(model.two.kernel[...], kernel)
