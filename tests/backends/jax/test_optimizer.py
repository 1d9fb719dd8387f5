import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import torch
from flax import nnx

import lora_one
from lora_one.backends.jax import lora_adamw, scale_by_lora_preconditioner
from lora_one.backends.numpy import ops as numpy_ops
from lora_one.backends.torch import LoraOneAdamW
from lora_one.backends.torch.optimizer import LoraPair
from lora_one.core import step
from lora_one.core.factors import Factors
from lora_one.core.precondition import precondition
from lora_one.errors import ConfigError, ModelError
from tests.backends.jax.models import counted_compilations, mlp, regression, squared_error


def tree(seed: int, shapes: dict[str, tuple] | None = None, dtype=jnp.float32) -> dict:
    rng = np.random.default_rng(seed)
    shapes = shapes or {"kernel_lora_a": (9, 4), "kernel_lora_b": (4, 12)}
    return {"layer": {name: jnp.asarray(rng.standard_normal(s), dtype) for name, s in shapes.items()}}


def spec(leaves: dict) -> Factors:
    """A 2-D pair as the spec has it, float64."""
    a, b = (np.asarray(leaves["layer"][f"kernel_lora_{side}"], np.float64) for side in "ab")
    return Factors(a.T, b.T)


@pytest.mark.feature("Preconditioned steps")
@pytest.mark.parametrize("reg", [None, 1e-2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_are_the_specs_and_torchs(reg, weight_decay):
    params = tree(0)
    tx = lora_adamw(1e-2, weight_decay=weight_decay, reg=reg)
    state = tx.init(params)
    pair, moments = spec(params), step.start_pair(numpy_ops, spec(params))
    in_torch = LoraPair(*(torch.nn.Parameter(torch.tensor(x)) for x in pair))
    pairs = [] if reg is None else [in_torch]
    reference = LoraOneAdamW(list(in_torch), pairs, reg=reg or 0.0, lr=1e-2, weight_decay=weight_decay)

    @jax.jit
    def go(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(20):
        grads = tree(100 + i)
        params, state = go(params, state, grads)
        pair, moments = step.adamw(numpy_ops, pair, spec(grads), moments, 1e-2, weight_decay=weight_decay, reg=reg)
        for parameter, gradient in zip(in_torch, spec(grads), strict=True):
            parameter.grad = torch.tensor(gradient)
        reference.step()
    for got, expected, other in zip(spec(params), pair, in_torch, strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-6)
        np.testing.assert_allclose(got, other.detach().numpy(), atol=5e-6)


def test_float64_agrees_to_1e_12():
    with jax.enable_x64(True):
        params, grads = tree(0, dtype=jnp.float64), tree(1, dtype=jnp.float64)
        tx = lora_adamw(1e-2, weight_decay=0.1, reg=1e-6)
        updates, _ = tx.update(grads, tx.init(params), params)
        new = spec(optax.apply_updates(params, updates))
    expected, _ = step.adamw(
        numpy_ops, spec(params), spec(grads), step.start_pair(numpy_ops, spec(params)), 1e-2, weight_decay=0.1
    )
    np.testing.assert_allclose(new.lora_A, expected.lora_A, atol=1e-12)
    np.testing.assert_allclose(new.lora_B, expected.lora_B, atol=1e-12)


def test_stacks_and_several_axes_are_folded_matrix_by_matrix():
    shapes = {"kernel_lora_a": (3, 2, 5, 4), "kernel_lora_b": (3, 4, 6, 2)}  # three matrices of (2, 5) -> (6, 2)
    params, grads = tree(0, shapes), tree(1, shapes)
    tx = scale_by_lora_preconditioner(1e-2)
    got, _ = tx.update(grads, tx.init(params), params)
    for i in range(3):
        flat = [
            Factors(
                np.asarray(t["layer"]["kernel_lora_a"][i], np.float64).reshape(10, 4).T,
                np.asarray(t["layer"]["kernel_lora_b"][i], np.float64).reshape(4, 12).T,
            )
            for t in (params, grads, got)
        ]
        expected = precondition(numpy_ops, flat[0], flat[1], 1e-2)
        np.testing.assert_allclose(flat[2].lora_A, expected.lora_A, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(flat[2].lora_B, expected.lora_B, rtol=2e-4, atol=1e-5)


def test_a_compiled_step_keeps_no_preconditioned_gradient_in_memory():
    """They are computed inside Adam's loops: what the step needs besides its arguments is a few r x r matrices."""
    shapes = {"kernel_lora_a": (1024, 8), "kernel_lora_b": (8, 1024)}
    params = {f"{n}": tree(n, shapes)["layer"] for n in range(2)}
    tx = lora_adamw(1e-2, reg=1e-2)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.default_device(jax.devices("cpu")[0]):  # cuBLAS has a workspace of its own
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 8 * 1024 / 2


def test_shapes_that_leave_the_stack_open_need_a_word():
    params = tree(0, {"lora_a": (4, 5, 4), "lora_b": (4, 4, 7)})
    with pytest.raises(ModelError, match=r"fit with 0 or 1 stacked axes: say which with stack_axes="):
        scale_by_lora_preconditioner().init(params)
    scale_by_lora_preconditioner(stack_axes={("layer", "lora"): 1}).init(params)


def test_narrow_factors_have_float32_moments_and_round_once():
    params, grads = tree(0, dtype=jnp.bfloat16), tree(1, dtype=jnp.bfloat16)
    tx = lora_adamw(1e-2, reg=1e-2)
    updates, state = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert new["layer"]["kernel_lora_a"].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("float32")}
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in (params, grads)]
    expected, _ = tx.update(wide[1], tx.init(wide[0]), wide[0])
    for got, want in zip(jax.tree.leaves(new), jax.tree.leaves(optax.apply_updates(wide[0], expected)), strict=True):
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_an_unpaired_factor_is_an_error_that_names_it():
    params = tree(0)
    del params["layer"]["kernel_lora_b"]
    with pytest.raises(ModelError, match=r"got none for: layer.kernel_lora_b"):
        scale_by_lora_preconditioner().init(params)
    with pytest.raises(ModelError, match=r"got \(9, 4\) and \(5, 12\), which do not fit"):
        scale_by_lora_preconditioner().init(tree(0, {"kernel_lora_a": (9, 4), "kernel_lora_b": (5, 12)}))
    with pytest.raises(ConfigError, match=r"update\(updates, state, params\)"):
        scale_by_lora_preconditioner().update(tree(0), optax.EmptyState())
    with pytest.raises(ConfigError, match="reg must be >= 0"):
        scale_by_lora_preconditioner(-1.0)
    with pytest.raises(ConfigError, match="damping must be"):
        lora_adamw(damping="none")


@pytest.mark.feature("Gradient accumulation")
def test_it_composes_with_what_optax_has():
    """Clipping, accumulation, masks, partitions and injected hyperparameters give what they give around plain steps."""
    params, grads = tree(0), tree(1)
    params["bias"], grads["bias"] = jnp.ones(3), jnp.ones(3)
    plain = lora_adamw(1e-2, reg=1e-2)
    expected, _ = plain.update(grads, plain.init(params), params)

    def same(tx, grads=grads, repeat=1, rtol=1e-5):
        state = tx.init(params)
        for _ in range(repeat):
            got, state = jax.jit(tx.update)(grads, state, params)
        for side in "ab":
            name = f"kernel_lora_{side}"
            np.testing.assert_allclose(got["layer"][name], expected["layer"][name], rtol=rtol, atol=1e-8)
        return got

    same(optax.inject_hyperparams(lora_adamw, static_args=("damping",))(learning_rate=1e-2, reg=1e-2))
    same(optax.MultiSteps(plain, every_k_schedule=2), repeat=2)
    same(optax.chain(optax.clip_by_global_norm(1e9), plain))
    lora = {"layer": True, "bias": False}
    mask = jax.tree.map(lambda x: x, {"layer": dict.fromkeys(params["layer"], True), "bias": False})
    assert lora["layer"]
    np.testing.assert_array_equal(same(optax.masked(plain, mask))["bias"], grads["bias"])
    labels = {"layer": dict.fromkeys(params["layer"], "lora"), "bias": "rest"}
    got = same(optax.partition({"lora": plain, "rest": optax.sgd(0.5)}, labels))
    np.testing.assert_allclose(got["bias"], -0.5)
    doubled = lora_adamw(1e-2, reg=1e-2, loraplus_lr_ratio=2.0)
    got, _ = doubled.update(grads, doubled.init(params), params)
    np.testing.assert_allclose(got["layer"]["kernel_lora_b"], 2 * expected["layer"]["kernel_lora_b"], rtol=1e-6)
    np.testing.assert_allclose(got["layer"]["kernel_lora_a"], expected["layer"]["kernel_lora_a"], rtol=1e-6)


@pytest.fixture(scope="module")
def model():
    config = lora_one.Config(rank=2, targets=["up", "fused"], passes=2)
    return lora_one.init(mlp(), regression(1), squared_error, config)[0]


@pytest.mark.feature("Resume")
def test_nnx_optimizer_trains_without_compiling_again_and_orbax_restores_its_state(model, tmp_path):
    model = nnx.clone(model)
    model.eval()
    optimizer = nnx.Optimizer(model, lora_one.optimizer(model, 1e-2, precondition=True, reg=1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def train(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(squared_error, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
        optimizer.update(model, grads)
        return loss

    batch = regression(1)[0]
    losses = [float(train(model, optimizer, batch)) for _ in range(2)]
    with counted_compilations() as found:
        losses += [float(train(model, optimizer, batch)) for _ in range(8)]
    assert found == []
    assert losses[-1] < losses[0]

    everything = nnx.to_pure_dict(nnx.state((nnx.state(model, nnx.LoRAParam), nnx.state(optimizer))))
    with orbax.checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", everything)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, everything))
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(everything), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_model_without_lora_is_an_error():
    with pytest.raises(ModelError, match="must have LoRA layers, got none in Mlp"):
        lora_one.optimizer(mlp())


WIDE_STEPS = """
import jax, numpy as np, optax, sys
from lora_one.backends.jax import lora_adamw
rng = np.random.default_rng(0)
draw = lambda *shape: jax.numpy.asarray(rng.standard_normal(shape, np.float32))
stack = [int(n) for n in sys.argv[1:]]
pair = lambda: {"lora_a": draw(*stack, 4096, 64), "lora_b": draw(*stack, 64, 4096)}
params, grads = ({f"layer{i}": pair() for i in range(8)} for _ in range(2))
tx = lora_adamw(1e-3, reg=1e-2)
state = tx.init(params)
def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state
compiled = jax.jit(step, donate_argnums=(0, 1))
for _ in range(20):
    params, state = jax.block_until_ready(compiled(params, state, grads))
assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
print("done")
"""


@pytest.mark.parametrize("stack", [[], ["4"]], ids=["pairs", "pairs of four layers"])
def test_wide_pairs_do_not_wait_for_each_other_on_two_threads(stack):
    """As XLA's pool has them on a machine with two cores, where batched decompositions once waited for ever."""
    environment = {**os.environ, "NPROC": "2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", WIDE_STEPS, *stack], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "done\n", done.stderr
