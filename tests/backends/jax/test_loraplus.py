"""LoRA+ on JAX: lora_B's own learning rate, beside PyTorch's optimizer and two optimizers of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_one
from lora_one.backends.jax import attach_plain, lora_adamw
from lora_one.core.factors import Factors
from lora_one.errors import ConfigError
from tests.backends.jax.models import mlp
from tests.backends.loraplus import trained_by_torch

RATIO = 4.0
# A dense layer, a stack of two, and experts in two layers: (stack..., in, r) and (stack..., r, out).
SHAPES = {"dense": (), "stack": (2,), "experts": (2, 4)}


def drawn(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    tree = {
        name: {"kernel_lora_a": rng.standard_normal((*n, 7, 3)), "kernel_lora_b": rng.standard_normal((*n, 3, 5))}
        for name, n in SHAPES.items()
    }
    return jax.tree.map(jnp.asarray, {**tree, "bias": rng.standard_normal(5)})


def pairs_of(tree: dict) -> dict:
    """All pairs as PyTorch has them, one by one."""
    pairs = {}
    for name, stack in SHAPES.items():
        a, b = (np.asarray(tree[name][f"kernel_lora_{side}"], float) for side in "ab")
        pairs |= {(name, place): Factors(a[place].T, b[place].T) for place in np.ndindex(stack)}
    return pairs


def schedule(step):
    return 1e-2 / (1.0 + step)


def trained(tx, params: dict, gradients: list[dict]) -> dict:
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def labelled(tree: dict) -> dict:
    return jax.tree.map_with_path(lambda keys, _: "b" if keys[-1].key == "kernel_lora_b" else "rest", tree)


@pytest.mark.feature("LoRA+")
@pytest.mark.parametrize("reg", [None, 1e-2])
def test_steps_are_those_of_pytorchs_optimizer_in_float64(reg):
    with jax.enable_x64(True):
        params, gradients = drawn(0), [drawn(1 + i) for i in range(4)]
        tx = lora_adamw(schedule, weight_decay=0.1, reg=reg, loraplus_lr_ratio=RATIO)
        got = pairs_of(trained(tx, params, gradients))
        options = {"precondition": reg is not None, "reg": reg or 0.0, "weight_decay": 0.1, "loraplus_lr_ratio": RATIO}
        factors = {"rate": 1e-2, "schedule": lambda step: 1 / (1 + step)}
        expected = trained_by_torch(pairs_of(params), list(map(pairs_of, gradients)), **factors, **options)
    for name, pair in expected.items():
        for ours, theirs in zip(got[name], pair, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12, err_msg=str(name))


@pytest.mark.feature("Learning-rate schedules")
@pytest.mark.parametrize("rate", [1e-2, schedule], ids=["number", "schedule"])
def test_steps_are_those_of_two_optimizers_of_optax(rate):
    params, gradients = drawn(0), [drawn(1 + i) for i in range(4)]
    faster = (lambda step: RATIO * rate(step)) if callable(rate) else RATIO * rate
    both = {"b": optax.adamw(faster, weight_decay=0.1), "rest": optax.adamw(rate, weight_decay=0.1)}
    expected = trained(optax.partition(both, labelled), params, gradients)
    got = trained(lora_adamw(rate, weight_decay=0.1, reg=None, loraplus_lr_ratio=RATIO), params, gradients)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6), got, expected)


def test_a_ratio_of_1_is_optaxs_adamw_to_the_bit():
    params, gradients = drawn(0), [drawn(1), drawn(2)]
    got = trained(lora_adamw(1e-2, weight_decay=0.1, reg=None, loraplus_lr_ratio=1.0), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, got, trained(optax.adamw(1e-2, weight_decay=0.1), params, gradients))


@pytest.mark.parametrize("start_steps", [None, 3])
def test_the_state_is_the_same_tree_for_any_ratio(start_steps):
    states = [lora_adamw(start_steps=start_steps, loraplus_lr_ratio=ratio).init(drawn(0)) for ratio in (1.0, RATIO)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_the_ratio_may_be_an_injected_hyperparameter():
    params, gradients = drawn(0), [drawn(1)]
    injected = optax.inject_hyperparams(lora_adamw, static_args=("damping",))(1e-2, reg=1e-2, loraplus_lr_ratio=RATIO)
    plain = lora_adamw(1e-2, reg=1e-2, loraplus_lr_ratio=RATIO)
    got, expected = (trained(tx, params, gradients) for tx in (injected, plain))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6), got, expected)


def test_the_optimizer_of_a_model_moves_each_lora_b_by_its_own_rate():
    """The first step of Adam moves each entry by its learning rate."""
    model = attach_plain(mlp(), lora_one.Config(rank=2, targets=["up", "fused"]))
    lora = nnx.state(model, nnx.LoRAParam)
    tx = lora_one.optimizer(model, 1e-2, loraplus_lr_ratio=RATIO)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora), lora)
    moved = {key[-1]: x for key, x in nnx.to_flat_state(updates)}
    for name, update in moved.items():
        expected = -1e-2 * (RATIO if name.endswith("lora_b") else 1.0)
        np.testing.assert_allclose(update[...], expected, rtol=1e-5, err_msg=name)
    assert {name[-1] for name in moved} == {"a", "b"}


@pytest.mark.feature("Parameter groups", refused=True)
@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_an_invalid_ratio_is_an_error(ratio):
    model = attach_plain(mlp(), lora_one.Config(rank=1))
    for make in (lora_adamw, lambda **options: lora_one.optimizer(model, **options)):
        with pytest.raises(ConfigError, match=f"loraplus_lr_ratio must be > 0, got {ratio}"):
            make(loraplus_lr_ratio=ratio)
    for name, value in {"param_groups": [], "fused": True}.items():
        with pytest.raises(ConfigError, match=f"{name} is for PyTorch models, got it for the jax backend: leave it"):
            lora_one.optimizer(model, **{name: value})
