"""Tiny Flax models, their batches, and the gradients of their kernels by jax.grad."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_one.backends.jax.nnx.layers import LoraLinear  # noqa: F401  (pickles name it)
from tests.arrays import best_rank


class Mlp(nnx.Module):
    """`shared` is called twice in one forward pass; `mix` has several input and output axes."""

    def __init__(self, rngs: nnx.Rngs, dtype=jnp.float32):
        options = {"rngs": rngs, "param_dtype": dtype, "dtype": dtype}
        self.up = nnx.Linear(8, 12, **options)
        self.shared = nnx.Linear(12, 12, use_bias=False, **options)
        self.fused = nnx.LinearGeneral(12, (3, 2, 4), **options)  # as a fused qkv projection
        self.mix = nnx.Einsum("bcnh,cnhd->bd", (3, 2, 4, 9), (9,), **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(9, 7, **options)

    def __call__(self, x):
        h = self.dropout(jnp.tanh(self.up(x)))
        h = jnp.tanh(self.shared(jnp.tanh(self.shared(h))))
        return self.down(jnp.tanh(self.mix(jnp.tanh(self.fused(h)))))


def mlp(dtype=jnp.float32) -> Mlp:
    return Mlp(nnx.Rngs(0), dtype)


def regression(count: int = 3, rows: int = 16, ins: int = 8, outs: int = 7) -> list:
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((rows, ins)).astype(np.float32), rng.standard_normal((rows, outs)).astype(np.float32))
        for _ in range(count)
    ]


def squared_error(model, batch):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def gradients(model: nnx.Module, batches: list, loss_fn) -> dict[tuple, np.ndarray]:
    """Mean gradient of each parameter in evaluation mode, float64, by jax.grad: path -> array in the shape it has."""
    model = nnx.clone(model)
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    grad = jax.jit(jax.grad(lambda p, batch: loss_fn(nnx.merge(graphdef, p, jax.tree.map(lambda x: x, rest)), batch)))
    total: dict[tuple, np.ndarray] = {}
    for batch in batches:
        for path, variable in nnx.to_flat_state(grad(params, batch)):
            value = np.asarray(variable[...], np.float64) / len(batches)
            total[tuple(path)] = total.get(tuple(path), 0) + value
    return total


def step_of(gradient: np.ndarray, rank: int, gamma: float = 128.0) -> np.ndarray:
    """The spec's B0 A0 for G: the best rank-r part of -G at spectral norm 1 / gamma."""
    return -best_rank(gradient, rank) / np.linalg.norm(gradient, 2) / gamma


def values(model: nnx.Module) -> dict[tuple, np.ndarray]:
    """A copy of all of a model's arrays."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return {tuple(path): np.array(variable.get_raw_value()) for path, variable in state}


def assert_same(got: dict[tuple, np.ndarray], expected: dict[tuple, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(got[path], value, err_msg=str(path))


@contextmanager
def counted_compilations() -> Iterator[list[float]]:
    """A list that grows by one entry for each XLA compilation meanwhile."""
    found: list[float] = []
    active = True

    def listen(event: str, seconds: float, **_) -> None:
        if active and event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        active = False
