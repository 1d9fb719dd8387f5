"""Every compiled part of `init` and of a training step can be lowered for a TPU and a GPU, of which no test has one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import lora_one
from lora_one.backends.jax import JaxOps, attach_plain, lora_adamw, open_session
from lora_one.backends.jax.llama.config import LlamaConfig
from lora_one.backends.jax.llama.model import LlamaForCausalLM, causal_lm_loss
from lora_one.backends.jax.passes.batches import arrays_and_rest
from lora_one.backends.jax.passes.folds import abstract_states
from lora_one.backends.jax.passes.sides import installed_sides
from lora_one.backends.jax.passes.totals import Folding, Scale
from lora_one.core.fold import aim, finish_fold, read_both_sides, start_fold
from lora_one.core.sides import Products, Sides
from tests.backends.jax.models import mlp, regression, squared_error

PLATFORMS = ["tpu", "cuda", "cpu"]
CONFIG = lora_one.Config(rank=4)


def assert_lowers(function, *arguments, **options) -> None:
    """Lower a compiled function for all platforms. JAX raises if one of them has no rule for an operation."""
    assert export.export(function, platforms=PLATFORMS)(*arguments, **options).platforms == tuple(PLATFORMS)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True, qkv_bias=False,
        output_bias=False, mlp_bias=False, qk_norm=True, windows=(None, None),
        rope=(("rope_theta", 1e4), ("rope_type", "default")),
    )  # fmt: skip
    return LlamaForCausalLM(config, nnx.Rngs(0), jnp.bfloat16)


@pytest.fixture(params=["mlp", "llama"])
def session(request):
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    if request.param == "mlp":
        model, batches, loss = mlp(), regression(1), squared_error
    else:
        model, batches, loss = llama(), [{"input_ids": tokens, "labels": tokens}], causal_lm_loss
    with open_session(model, batches, loss, CONFIG) as session:
        session.batch = arrays_and_rest(batches[0])
        yield session


def test_the_check_can_fail():
    """Eigenvalues of matrices that are not symmetric exist on a CPU only."""
    with pytest.raises(NotImplementedError, match="eig"):
        assert_lowers(jax.jit(jnp.linalg.eigvals), jnp.eye(3))


def test_steps_of_all_passes(session):
    function, binding = session.attached.gradient_function, session.attached.binding
    sides = {
        layer.name: Sides(jnp.ones((layer.in_features, 5)), jnp.ones((layer.out_features, 4)))
        for layer in session.layers
    }
    factors = installed_sides(binding.sites, sides)
    scale = Scale(np.float32(1), np.bool_(True))
    assert_lowers(function.step, factors, factors, binding.frozen, scale, *session.batch)
    states = abstract_states(binding.sites, CONFIG)
    folds = {name: Folding(state, jax.ShapeDtypeStruct((), jnp.float32)) for name, state in states.items()}
    assert_lowers(function.fold_step, folds, {}, binding.frozen, scale, *session.batch)
    assert_lowers(function.loss, binding.factors(), binding.frozen, *session.batch)


def test_what_becomes_of_their_results():
    """The start of a state, further reads of the gradient, and the triplets."""
    ops, k = JaxOps(), 6
    omega, test = jnp.ones((24, k)), jnp.ones((24, 8))
    assert_lowers(jax.jit(partial(start_fold, ops, out_features=40)), omega, test=test)
    state = start_fold(ops, omega, 40, test)
    assert_lowers(jax.jit(partial(aim, ops)), state, Products(jnp.ones((40, k + 8)), jnp.ones((24, k))))
    assert_lowers(jax.jit(partial(read_both_sides, ops)), state, Products(jnp.ones((40, k)), jnp.ones((24, k))))
    assert_lowers(jax.jit(partial(finish_fold, ops, rank=4)), state)


@pytest.mark.parametrize("precondition", [False, True])
def test_both_optimizers(precondition):
    model = attach_plain(llama(), CONFIG)
    tx = lora_one.optimizer(model, 1e-3, precondition=precondition)
    factors = nnx.state(model, nnx.LoRAParam)
    assert_lowers(jax.jit(tx.update), factors, tx.init(factors), factors)


@pytest.mark.parametrize("precondition", [False, True])
def test_the_start_from_the_first_gradients(precondition):
    factors = nnx.state(attach_plain(llama(), CONFIG), nnx.LoRAParam)
    tx = lora_adamw(reg=1e-6 if precondition else None, start_steps="auto")
    assert_lowers(jax.jit(tx.update), factors, tx.init(factors), factors)


def test_the_decompositions_that_a_gpu_gets(monkeypatch):
    """On a GPU another algorithm for the SVD is chosen."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.ones((24, 6))
    exported = export.export(jax.jit(JaxOps().svd), platforms=["cuda"])(x)
    assert "cusolver_gesvd" in exported.mlir_module()
