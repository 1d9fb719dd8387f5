"""What "all-linear" says of the weights that it leaves out, and of which models it says nothing."""

import warnings

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lora_one
from lora_one.backends.jax import LinenModel, PytreeModel
from lora_one.backends.jax.llama.config import LlamaConfig
from lora_one.backends.jax.llama.model import LlamaForCausalLM, causal_lm_loss
from lora_one.errors import TargetsWarning
from tests.backends.jax.models import regression, squared_error

BATCHES = regression(1, rows=4, ins=8, outs=8)
TOKENS = np.arange(8).reshape(2, 4)
CONFIG = lora_one.Config(rank=2, gradient="exact")


def said(model, batches, loss, config=CONFIG):
    """The text of the TargetsWarning, which names the line of the call; empty if there is none."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lora_one.init(model, batches, loss, config)
    found = [str(w.message) for w in seen if issubclass(w.category, TargetsWarning)]
    assert {w.filename for w in seen if issubclass(w.category, TargetsWarning)} <= {__file__}
    assert len(found) <= 1
    return found[0] if found else ""


class Einsum(nnx.Module):
    def __init__(self, equation, shape, rngs):
        self.equation, self.w = equation, nnx.Param(nnx.initializers.normal(0.2)(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Block(nnx.Module):
    def __init__(self, rngs):
        self.q_einsum = Einsum("bd,ndh->bnh", (4, 8, 2), rngs)
        self.o_einsum = Einsum("bnh,nhd->bd", (4, 2, 8), rngs)
        self.gate_proj = nnx.Linear(8, 8, rngs=rngs)
        self.conv = nnx.Conv(1, 1, (3,), rngs=rngs)
        self.lm_head = Einsum("bd,dv->bv", (8, 8), rngs)

    def __call__(self, x):
        x = self.gate_proj(x + self.o_einsum(jnp.tanh(self.q_einsum(x))))
        return self.lm_head(self.conv(x[..., None])[..., 0])


class Deep(nnx.Module):
    """The same weights, in remat, under scan, cast and reshaped on the way."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.stack = nnx.vmap(lambda r: Einsum("bd,de->be", (8, 8), r), in_axes=0)(rngs.fork(split=3))

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            kernel = layer.w[...].astype("bfloat16").astype("float32").reshape(8, 2, 4).reshape(8, 8)
            return jnp.tanh(x @ kernel)

        return run(x, self.stack)


def test_weights_in_layers_of_ones_own_are_named():
    text = said(Deep(nnx.Rngs(0)), BATCHES, squared_error)
    names = text.removeprefix("no LoRA on ").split(":")[0].split(", ")
    assert names == ["blocks.*.conv.kernel", "blocks.*.o_einsum.w", "blocks.*.q_einsum.w", "stack.w"]
    assert "it is on 2 weights" in text
    assert "register_layer" in text
    assert not said(Deep(nnx.Rngs(0)), BATCHES, squared_error, lora_one.Config(rank=2, targets=["gate_proj"]))


class Stacked(equinox.Module):
    blocks: equinox.nn.Linear
    table: equinox.nn.Embedding
    head: equinox.nn.Linear
    lm_head: equinox.nn.Linear

    def __init__(self, key):
        make = equinox.filter_vmap(lambda k: equinox.nn.Linear(8, 8, key=k))
        self.blocks, self.table = make(jax.random.split(key, 3)), equinox.nn.Embedding(8, 8, key=key)
        self.head, self.lm_head = equinox.nn.Linear(8, 8, key=key), equinox.nn.Linear(8, 8, key=key)

    def __call__(self, x):
        arrays, static = equinox.partition(self.blocks, equinox.is_array)
        x, _ = jax.lax.scan(lambda x, a: (jnp.tanh(equinox.combine(a, static)(x)), None), x, arrays)
        return self.lm_head(self.head(x + self.table(jnp.argmax(x))))


def test_stacked_equinox_blocks_are_named_and_the_output_layer_is_left_out_in_silence():
    def loss(model, batch):
        return squared_error(jax.vmap(model), batch)

    model = PytreeModel(Stacked(jax.random.key(0)))
    assert said(model, BATCHES, loss).startswith("no LoRA on blocks.weight: ")
    _, report = lora_one.init(model.replace(axes={r"blocks\.weight": "soi"}), BATCHES, loss, CONFIG)
    assert {layer.name for layer in report.layers} == {"head.weight", *(f"blocks.weight.{i}" for i in range(3))}
    assert not said(model.replace(axes={r"blocks\.weight": "soi"}), BATCHES, loss)


class OwnLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = x + jnp.tanh(x @ self.param("mine", linen.initializers.normal(0.2), (8, 8)))
        return linen.Dense(8, name="d")(linen.Conv(1, (3,), name="conv")(x[..., None])[..., 0])


class OrdinaryLinen(linen.Module):
    """Embedded, normalised, attended, stacked; with positions that are added."""

    @linen.compact
    def __call__(self, tokens):
        table = linen.Embed(8, 8)
        x = table(tokens) + self.param("positions", linen.initializers.normal(), (4, 8))

        class Layer(linen.Module):
            @linen.compact
            def __call__(self, x, _):
                x = x + linen.MultiHeadDotProductAttention(2)(linen.LayerNorm()(x))
                return x + linen.Dense(8)(linen.RMSNorm()(x)), None

        stack = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return table.attend(stack()(x, None)[0])


class OrdinaryNnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.table, self.positions = nnx.Embed(8, 8, rngs=rngs), nnx.Param(0.1 * jnp.ones((4, 8)))
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norms = nnx.vmap(lambda r: nnx.LayerNorm(8, rngs=r), in_axes=0)(rngs.fork(split=2))

    def __call__(self, tokens):
        x = self.table(tokens) + self.positions[...]

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, norm):
            return norm(x)

        return self.table.attend(self.attention(run(x, self.norms)))


def test_linen_weights_are_named():
    net = OwnLinen()
    model = LinenModel(net, net.init(jax.random.key(0), BATCHES[0][0]))
    assert said(model, BATCHES, squared_error).startswith("no LoRA on conv.kernel, mine: ")


def llama(tied):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, rms_norm_eps=1e-6, tie_word_embeddings=tied, qkv_bias=True,
        output_bias=False, mlp_bias=False, qk_norm=True, windows=(None, 2),
        rope=(("rope_theta", 1e4), ("rope_type", "default")),
    )  # fmt: skip
    return LlamaForCausalLM(config, nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["linen", "nnx", "llama", "tied llama"])
def test_nothing_is_said_of_embeddings_norms_positions_and_output_layers(kind):
    if "llama" in kind:
        batch = {"input_ids": TOKENS, "labels": TOKENS}
        assert said(llama(kind.startswith("tied")), [batch], causal_lm_loss) == ""
        return

    def loss(model, tokens):
        return jnp.mean(model(tokens) ** 2)

    net = OrdinaryLinen()
    model = OrdinaryNnx() if kind == "nnx" else LinenModel(net, net.init(jax.random.key(0), TOKENS))
    assert said(model, [TOKENS], loss) == ""
