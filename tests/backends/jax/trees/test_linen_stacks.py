"""Linen layers stacked along any axis: the start of each, merging, and opening on a fresh model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import lora_one
from lora_one.backends.jax import LinenModel
from lora_one.backends.jax.layout import plain_layout
from lora_one.backends.jax.trees.models import AdaptedWeight
from lora_one.errors import CheckpointError, ModelError
from tests.backends.jax.models import regression, squared_error, step_of

ROWS = regression(1, rows=8, ins=4, outs=4)


class Dense(linen.Module):
    """Square, so that with 4 layers of rank 4 all sizes agree."""

    @linen.compact
    def __call__(self, x, _):
        return x + jnp.tanh(linen.Dense(4, use_bias=False, name="d")(x)), None


class Heads(linen.Module):
    """Several axes of input and output."""

    @linen.compact
    def __call__(self, x, _):
        h = jnp.tanh(linen.DenseGeneral((2, 3), use_bias=False, name="split")(x))
        return x + linen.DenseGeneral(4, axis=(-2, -1), use_bias=False, name="join")(h), None


class Einsum(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + jnp.tanh(linen.Einsum((4, 4), "bi,oi->bo", use_bias=False, name="e")(x)), None


def scanned(block, *axes, count=4):
    """The block in nested scans: the outermost axis first."""
    for axis in reversed(axes):
        block = linen.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=count)
    return block


class Net(linen.Module):
    block: type
    axes: tuple
    count: int = 4

    @linen.compact
    def __call__(self, x):
        return scanned(linen.remat(self.block), *self.axes, count=self.count)(name="stack")(x, None)[0]


class Experts(linen.Module):
    """nn.vmap over layers, along axis 1 of their kernels, the inputs being shared."""

    @linen.compact
    def __call__(self, x):
        many = linen.vmap(
            linen.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=None, axis_size=4
        )
        return jnp.mean(jnp.tanh(many(4, use_bias=False, name="d")(x)), axis=0)


NETS = {
    "axis 1, sizes agree": (Net(Dense, (1,)), {"stack.d": ((1,), (0,), (2,))}),
    "last axis, sizes agree": (Net(Dense, (-1,)), {"stack.d": ((2,), (0,), (1,))}),
    "axis 2, other sizes": (Net(Dense, (2,), 3), {"stack.d": ((2,), (0,), (1,))}),
    "heads, axis 1": (
        Net(Heads, (1,), 2),
        {"stack.split": ((1,), (0,), (2, 3)), "stack.join": ((1,), (0, 2), (3,))},
    ),
    "heads, axis -2": (
        Net(Heads, (-2,), 3),
        {"stack.split": ((2,), (0,), (1, 3)), "stack.join": ((2,), (0, 1), (3,))},
    ),
    "einsum, axis 1": (Net(Einsum, (1,)), {"stack.e": ((1,), (2,), (0,))}),
    "two scans": (Net(Dense, (1, -1), 2), {"stack.d": ((1, 3), (0,), (2,))}),
    "two scans in front": (Net(Dense, (0, 1), 2), {"stack.d": ((0, 2), (1,), (3,))}),
    "vmap, sizes agree": (Experts(), {"d": ((1,), (0,), (2,))}),
}


def kernel(params, name):
    for part in name.split("."):
        params = params[part]
    return np.asarray(params["kernel"], np.float64)


def matrices(array, groups):
    """The (out, in) matrices of an array whose stack, input and output axes are these."""
    array = np.transpose(array, [axis for group in groups for axis in group])
    sizes = [int(np.prod([array.shape[i] for i in range(len(array.shape))][: len(groups[0])]))]
    ins = int(np.prod(array.shape[len(groups[0]) : len(groups[0]) + len(groups[1])]))
    return np.swapaxes(array.reshape(sizes[0], ins, -1), 1, 2)


@pytest.mark.parametrize("case", NETS)
def test_every_layer_of_a_stack_gets_its_own_step_and_a_fresh_model_opens_it(case, tmp_path):
    net, layers = NETS[case]
    x, y = ROWS[0]
    variables = net.init(jax.random.key(0), x)
    config = lora_one.Config(rank=4, gradient="exact")
    model, report = lora_one.init(LinenModel(net, variables), ROWS, squared_error, config)
    gradient = jax.grad(lambda v: jnp.mean((net.apply(v, x) - y) ** 2))(variables)["params"]
    merged = lora_one.merge(model)
    for name, groups in layers.items():
        change = kernel(merged.variables["params"], name) - kernel(variables["params"], name)
        found, truth = matrices(change / model.scaling, groups), matrices(kernel(gradient, name), groups)
        assert len(found) > 1
        for got, g in zip(found, truth, strict=True):
            expected = step_of(g, 4)
            np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    assert len(report.layers) == sum(len(matrices(kernel(gradient, name), groups)) for name, groups in layers.items())
    out = model(x)
    assert float(np.abs(out - net.apply(variables, x)).max()) > 1e-3
    np.testing.assert_allclose(net.apply(merged.variables, x), out, atol=1e-5)
    lora_one.save(model, tmp_path, report)
    loaded = lora_one.load(LinenModel(net, variables), tmp_path)
    np.testing.assert_allclose(loaded(x), out, atol=1e-6)
    np.testing.assert_allclose(lora_one.merge(loaded)(x), out, atol=1e-5)


class Split(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + jnp.sum(linen.DenseGeneral((4, 2), use_bias=False, name="split")(x), -1), None


def test_what_cannot_be_cut_or_is_boxed_is_an_error():
    net = Net(Split, (3,), 2)
    with pytest.raises(ModelError, match=r"stack.split: its kernel \(4, 4, 2, 2\) is stacked along axis 3"):
        lora_one.init(LinenModel(net, net.init(jax.random.key(0), ROWS[0][0])), ROWS, squared_error)
    boxed = linen.Dense(4, kernel_init=linen.with_partitioning(linen.initializers.ones, (None, "model")))
    model = LinenModel(boxed, boxed.init(jax.random.key(0), ROWS[0][0]))
    with pytest.raises(ModelError, match=r"got boxes with metadata.*unbox"):
        lora_one.init(model, ROWS, squared_error)


class Attention(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, name="att")(x[None])[0]
        return linen.Dense(4, name="d")(h)


def test_a_folder_without_the_note_opens_where_the_shapes_leave_no_doubt(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_one.backends.jax.files.note_of", lambda model: {})
    x = ROWS[0][0]
    config = lora_one.Config(rank=2, passes=2)
    for net, opens in ((Attention(), True), (Net(Dense, (0,), 3), True), (Net(Dense, (1,)), False)):
        variables = net.init(jax.random.key(1), x)
        model, _ = lora_one.init(LinenModel(net, variables), ROWS, squared_error, config)
        lora_one.save(model, tmp_path)
        if opens:
            again = lora_one.load(LinenModel(net, variables), tmp_path)
            np.testing.assert_allclose(again(x), model(x), atol=1e-6)
        else:
            with pytest.raises(CheckpointError, match=r"stack.d: its kernel \(4, 4, 4\) does not say which axes"):
                lora_one.load(LinenModel(net, variables), tmp_path)
    other = Net(Dense, (0,), 2)
    with pytest.raises(CheckpointError, match=r"stack.d"):
        lora_one.load(LinenModel(other, other.init(jax.random.key(0), x)), tmp_path)


@pytest.mark.parametrize(
    "note",
    [
        "{",
        "[]",
        '{"d": 1}',
        '{"d": {"shape": [4, 4], "stack": [], "ins": [0], "outs": [0], "lifts": []}}',
        '{"d": {"shape": [4, 4], "stack": [], "ins": [0], "outs": [1], "lifts": [7]}}',
        '{"d": {"shape": [4, 4], "stack": [], "ins": ["0"], "outs": [1], "lifts": []}}',
    ],
)
def test_a_note_that_is_none_is_an_error(note, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_one.backends.jax.files.note_of", lambda model: {"lora_one.linen_kernels": note})
    net = linen.Dense(4, name="d")
    model = LinenModel(net, {"params": {"d": {"kernel": np.ones((4, 4), "f"), "bias": np.ones(4, "f")}}})
    layouts = (AdaptedWeight("d", "kernel", plain_layout((4, 4), 1, 1)),)
    factors = {"kernel_lora_a": np.ones((4, 1), "f"), "kernel_lora_b": np.ones((1, 4), "f")}
    lora_one.save(model.replace(layouts=layouts, lora={"d": factors}), tmp_path)
    with pytest.raises(CheckpointError, match=r"its note lora_one\.linen_kernels cannot be read"):
        lora_one.load(model, tmp_path)
