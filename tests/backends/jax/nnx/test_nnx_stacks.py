"""NNX layers that nnx.vmap and nnx.scan cut along another axis than the first, where all sizes agree."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_one
from lora_one.errors import ModelError
from tests.backends.jax.models import assert_same, gradients, regression, squared_error, step_of, values

BATCHES = regression(1, rows=8, ins=4, outs=4)


class Stack(nnx.Module):
    """Four square layers of size 4, made and cut along an axis by nnx.scan, or by nnx.vmap side by side."""

    def __init__(self, axis, by="scan"):
        make = nnx.vmap(lambda r: nnx.Linear(4, 4, use_bias=False, rngs=r), in_axes=0, out_axes=axis)
        self.blocks = make(nnx.Rngs(0).fork(split=4))
        self.axis, self.by = axis, by

    def __call__(self, x):
        if self.by == "vmap":
            return jnp.mean(nnx.vmap(lambda block, x: jnp.tanh(block(x)), in_axes=(self.axis, None))(self.blocks, x), 0)

        @nnx.scan(in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        def run(x, block):
            return jnp.tanh(block(x)) + x

        return run(x, self.blocks)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize(("axis", "by"), [(1, "scan"), (-1, "scan"), (1, "vmap"), (2, "vmap")])
def test_another_axis_is_an_error_whatever_the_sizes(axis, by, rank):
    model = Stack(axis, by)
    before = values(model)
    with pytest.raises(ModelError, match=r"blocks: its kernel \(4, 4, 4\) must be stacked along axis 0"):
        lora_one.init(model, BATCHES, squared_error, lora_one.Config(rank=rank, passes=2))
    assert_same(values(model), before)
    assert type(model.blocks) is nnx.Linear


@pytest.mark.parametrize("by", ["scan", "vmap"])
def test_the_first_axis_is_none(by):
    config = lora_one.Config(rank=4, gradient="exact")
    adapted, _ = lora_one.init(Stack(0, by), iter(BATCHES), squared_error, config)
    truth = gradients(Stack(0, by), BATCHES, squared_error)["blocks", "kernel"]
    a, b = (np.asarray(getattr(adapted.blocks, f"kernel_lora_{side}")[...], np.float64) for side in "ab")
    for i in range(4):
        expected = step_of(truth[i].T, 4)
        np.testing.assert_allclose((a[i] @ b[i]).T, expected, atol=1e-4 * np.abs(expected).max())
