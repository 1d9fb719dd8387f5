"""NNX layers that nnx.vmap and nnx.scan cut along any axis, where their sizes show it and where they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_one
from lora_one.backends.jax import attach_plain
from lora_one.backends.jax.layout import plain_layout, possible_layouts
from lora_one.backends.jax.nnx.inject import inject
from lora_one.errors import ModelError
from tests.backends.jax.models import gradients, regression, squared_error, step_of

BATCHES = regression(1, rows=8, ins=4, outs=4)
X = BATCHES[0][0]


class Heads(nnx.Module):
    """Several axes of input and output."""

    def __init__(self, key):
        rngs = nnx.Rngs(key)
        self.split = nnx.LinearGeneral(4, (2, 3), use_bias=False, rngs=rngs)
        self.join = nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.join(jnp.tanh(self.split(x)))


def linear(key):
    return nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(key))


class Stack(nnx.Module):
    """Layers made and cut along an axis by nnx.scan, or by nnx.vmap side by side."""

    def __init__(self, axis, by="scan", make=linear, count=4):
        self.axis, self.by = axis, by
        self.blocks = nnx.vmap(make, in_axes=0, out_axes=axis)(jax.random.split(jax.random.key(0), count))

    def __call__(self, x):
        if self.by == "vmap":
            return jnp.mean(nnx.vmap(lambda block, x: jnp.tanh(block(x)), in_axes=(self.axis, None))(self.blocks, x), 0)

        @nnx.scan(in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        def run(x, block):
            return jnp.tanh(block(x)) + x

        return run(x, self.blocks)


class Nested(nnx.Module):
    """Three times two square layers: the outer axis last, the inner one second."""

    def __init__(self):
        make = nnx.vmap(nnx.vmap(linear, in_axes=0, out_axes=1), in_axes=0, out_axes=-1)
        self.blocks = make(jax.random.split(jax.random.key(0), (3, 2)))  # (4, 2, 4, 3)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 1), out_axes=nnx.Carry)
        def inner(x, block):
            return jnp.tanh(block(x)) + x

        @nnx.scan(in_axes=(nnx.Carry, -1), out_axes=nnx.Carry)
        def outer(x, blocks):
            return inner(x, blocks)

        return outer(x, self.blocks)


# case -> the model, and the axes of stack, input and output of its kernels
CASES = {
    "first, all sizes agree": (lambda: Stack(0, "vmap"), {("blocks",): ((0,), (1,), (2,))}),
    "second, all sizes agree": (lambda: Stack(1), {("blocks",): ((1,), (0,), (2,))}),
    "last of a vmap, all sizes agree": (lambda: Stack(2, "vmap"), {("blocks",): ((2,), (0,), (1,))}),
    "the one before the last of several": (
        lambda: Stack(-2, make=Heads, count=5),
        {("blocks", "split"): ((2,), (0,), (1, 3)), ("blocks", "join"): ((2,), (0, 1), (3,))},
    ),
    "nested": (Nested, {("blocks",): ((1, 3), (0,), (2,))}),
}


def matrices(kernel, groups):
    """The (out, in) matrices of a kernel with these axes of stack, input and output."""
    count, ins, outs = (int(np.prod([kernel.shape[axis] for axis in group])) for group in groups)
    kernel = np.transpose(kernel, [axis for group in groups for axis in group])
    return np.swapaxes(kernel.reshape(count, ins, outs), 1, 2)


@pytest.mark.feature("Layers stacked on any axis")
@pytest.mark.parametrize("case", CASES)
def test_every_layer_of_a_stack_gets_its_own_step_and_a_fresh_model_opens_it(case, tmp_path):
    make, layers = CASES[case]
    gradient, before = gradients(make(), BATCHES, squared_error), dict(nnx.to_flat_state(nnx.state(make())))
    config = lora_one.Config(rank=2, gradient="exact")
    model, report = lora_one.init(make(), iter(BATCHES), squared_error, config)
    assert len(report.layers) == sum(len(matrices(gradient[(*path, "kernel")], g)) for path, g in layers.items())
    y = model(X)
    lora_one.save(model, tmp_path, report)
    loaded = lora_one.load(make(), tmp_path)
    np.testing.assert_allclose(loaded(X), y, atol=1e-6)
    merged = lora_one.merge(loaded)
    np.testing.assert_allclose(merged(X), y, atol=1e-5)
    after = dict(nnx.to_flat_state(nnx.state(merged)))
    assert after.keys() == before.keys()
    for path, groups in layers.items():
        change = np.asarray(after[(*path, "kernel")][...] - before[(*path, "kernel")][...], np.float64)
        truth = matrices(gradient[(*path, "kernel")], groups)
        for got, g in zip(matrices(change, groups) / config.scaling, truth, strict=True):
            expected = step_of(g, 2)
            np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), err_msg=str(path))


@pytest.mark.parametrize("start_steps", [0, 1])
def test_the_optimizer_reads_the_axes_from_the_model(start_steps):
    """A step, of the start or of preconditioned AdamW, equals that of the same layers stacked in front."""
    stepped = {}
    for axis in (0, 2):
        model = Stack(axis, count=3)
        attach_plain(model, lora_one.Config(rank=2))
        for name in ("kernel_lora_a", "kernel_lora_b")[: 1 if start_steps else 2]:  # a start needs B = 0
            factor = getattr(model.blocks, name)
            front = np.random.default_rng(len(name)).standard_normal(np.moveaxis(factor[...], axis, 0).shape)
            factor[...] = jnp.moveaxis(jnp.asarray(front, jnp.float32), 0, axis)
        tx = lora_one.optimizer(model, 1e-2, precondition=True, reg=1e-2, start_steps=start_steps)
        lora = nnx.state(model, nnx.LoRAParam)
        gradients = jax.tree.map(lambda x: jnp.cos(x + jnp.sum(x, axis, keepdims=True)), lora)  # noqa: B023
        updates, _ = jax.jit(tx.update)(gradients, tx.init(lora), lora)
        stepped[axis] = [jnp.moveaxis(leaf, axis, 0) for leaf in jax.tree.leaves(updates)]
    for got, expected in zip(stepped[2], stepped[0], strict=True):
        assert float(jnp.abs(expected).max()) > 1e-3
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_layouts_that_sizes_admit():
    inner = plain_layout((4, 2, 3), 1, 2)
    assert [x.lifts for x in possible_layouts((5, 4, 2, 3), inner)] == [(0,)]
    assert [x.lifts for x in possible_layouts((4, 5, 2, 3), inner)] == [(1,), (-3,)]  # of lora_a (4, 5, r) or (5, 4, r)
    assert [x.stack for x in possible_layouts((4, 4, 4), plain_layout((4, 4), 1, 1))] == [(0,), (1,), (2,)]
    with pytest.raises(ValueError, match=r"its kernel must be \(4, 2, 3\) with the axes of stacks anywhere between"):
        possible_layouts((4, 2, 7), inner)


def test_a_note_of_axes_that_a_model_has_not_is_an_error():
    model = Stack(0, make=lambda key: nnx.Linear(4, 5, rngs=nnx.Rngs(key)), count=3)
    with pytest.raises(ModelError, match=r"blocks: its kernel \(3, 4, 5\) cannot be stacked along the axes \(1,\)"):
        inject(model, {"blocks": (1, 1.0)}, lifts={"blocks": (1,)})
    assert type(model.blocks) is nnx.Linear
