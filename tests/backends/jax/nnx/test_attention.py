"""MultiHeadAttention: its query, key, value and out are LinearGeneral layers with heads x head_dim axes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_one
from tests.arrays import best_rank

RANK = 3


def test_attention_is_adapted_layer_by_layer():
    model = nnx.MultiHeadAttention(num_heads=4, in_features=16, qkv_features=24, decode=False, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(rng.standard_normal((2, 5, 16)), jnp.float32) for _ in range(2)]

    def loss_fn(model, x):
        return jnp.mean(jnp.square(model(x) - 1.0))

    kernels = nnx.state(model, nnx.Param)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    total = jax.tree.map(jnp.zeros_like, kernels)
    for x in batches:
        gradient = jax.grad(lambda p, x=x: loss_fn(nnx.merge(graphdef, p, rest), x))(kernels)
        total = jax.tree.map(jnp.add, total, gradient)

    model, report = lora_one.init(model, batches, loss_fn, lora_one.Config(rank=RANK, gradient="exact"))
    assert [layer.name for layer in report.layers] == ["key", "out", "query", "value"]
    for name in ("query", "key", "value", "out"):
        layer = getattr(model, name)
        # query: (in, heads, head_dim); out: (heads, head_dim, out)
        rows = 16 if name != "out" else 24
        g = np.asarray(total[name]["kernel"][...], np.float64).reshape(rows, -1).T / 2  # (out, in)
        a = np.asarray(layer.kernel_lora_a[...], np.float64).reshape(-1, RANK)
        b = np.asarray(layer.kernel_lora_b[...], np.float64).reshape(RANK, -1)
        step = -best_rank(g, RANK) / np.linalg.norm(g, 2) / 128
        assert np.linalg.norm((a @ b).T - step) <= 1e-4 * np.linalg.norm(step), name
