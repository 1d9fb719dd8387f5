"""The start without data inside of an optax transformation, on trees of factors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_one.backends.jax import lora_adamw
from lora_one.backends.jax.deferred import DeferredState
from lora_one.backends.numpy import ops as numpy_ops
from lora_one.core.deferred import LEAST_STEPS, MOST_STEPS, StartState, settled, start_step
from lora_one.core.factors import Factors
from lora_one.errors import ConfigError, ModelError

RANK, GAMMA = 4, 128.0
SHAPES = {
    "one": ((9,), (12,)),
    "two": ((9,), (12,)),
    "three": ((9,), (12,)),
    "wide": ((2, 5), (6, 2)),  # several input and output axes
}
STACKED = {"three": 3}  # layers


def factors(seed: int = 0, dtype=jnp.float32) -> dict:
    """Plain LoRA's start, and a bias."""
    rng = np.random.default_rng(seed)
    tree = {"bias": jnp.asarray(rng.standard_normal(3), dtype)}
    for name, (ins, outs) in SHAPES.items():
        stack = (STACKED[name],) if name in STACKED else ()
        tree[name] = {
            "kernel_lora_a": jnp.asarray(rng.standard_normal((*stack, *ins, RANK)), dtype),
            "kernel_lora_b": jnp.zeros((*stack, RANK, *outs), dtype),
        }
    return tree


def matrices(tree: dict, name: str) -> list[Factors]:
    """The spec's pairs of one entry, in float64."""
    n = STACKED.get(name, 1)
    a, b = (np.asarray(tree[name][f"kernel_lora_{side}"], np.float64) for side in "ab")
    a, b = a.reshape(n, -1, RANK), b.reshape(n, RANK, -1)
    return [Factors(x.T, y.T) for x, y in zip(a, b, strict=True)]


def weights(seed: int) -> dict[str, np.ndarray]:
    """A gradient of each weight, (n, in, out), with singular values that fall."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, (ins, outs) in SHAPES.items():
        n, k, m = STACKED.get(name, 1), int(np.prod(ins)), int(np.prod(outs))
        drawn[name] = rng.standard_normal((n, k, 6)) / 2.0 ** np.arange(6) @ rng.standard_normal((n, 6, m))
    return drawn


def gradients(tree: dict, of_weights: dict) -> dict:
    """The gradients of the factors: H b^T and a^T H for y = x a b, H = dL/d(ab)."""
    made = {"bias": jnp.ones_like(tree["bias"])}
    for name, gradient in of_weights.items():
        a, b = (tree[name][f"kernel_lora_{side}"] for side in "ab")
        n = STACKED.get(name, 1)
        h = jnp.asarray(gradient, a.dtype)
        flat_a, flat_b = a.reshape(n, -1, RANK), b.reshape(n, RANK, -1)
        made[name] = {
            "kernel_lora_a": (h @ jnp.matrix_transpose(flat_b)).reshape(a.shape),
            "kernel_lora_b": (jnp.matrix_transpose(flat_a) @ h).reshape(b.shape),
        }
    return made


def stepper(tx):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


AUTO = lora_adamw(1e-2, reg=None, start_steps="auto")
auto_step = stepper(AUTO)


def states_of(state: DeferredState) -> dict[str, list[StartState]]:
    """The states of each entry's pairs, in float64: those of "one" to "three" are one stack, in the tree's order."""
    stacks = [
        [StartState(np.asarray(s, float), np.asarray(a, float)) for s, a in zip(*kind, strict=True)]
        for kind in state.starts
    ]
    return {"one": stacks[0][:1], "three": stacks[0][1:4], "two": stacks[0][4:], "wide": stacks[1]}


def assert_step_of_the_spec(before, grads, state, after, new, tolerance) -> None:
    """One step of the start, from the factors and states that JAX had. Signs of singular vectors may differ."""
    for name in SHAPES:
        given = zip(matrices(before, name), matrices(grads, name), states_of(state)[name], strict=True)
        got = zip(matrices(after, name), states_of(new)[name], strict=True)
        for (pair, gradient, old), (factors_after, state_after) in zip(given, got, strict=True):
            expected, expected_state = start_step(numpy_ops, pair, gradient, old, GAMMA)
            product = expected.lora_B @ expected.lora_A
            error = np.abs(factors_after.lora_B @ factors_after.lora_A - product).max()
            assert error < tolerance * np.abs(product).max(), name
            for one, other in zip(factors_after, expected, strict=True):  # each has its share of the singular values
                lengths = (np.linalg.svd(x, compute_uv=False) for x in (one, other))
                np.testing.assert_allclose(*lengths, rtol=tolerance, atol=tolerance * GAMMA**-0.5)
            np.testing.assert_allclose(state_after.s, expected_state.s, rtol=tolerance, atol=tolerance * old.s.max())
            np.testing.assert_allclose(state_after.agreement, expected_state.agreement, atol=10 * tolerance)


@pytest.mark.feature("Learning-rate schedules")
@pytest.mark.feature("Start without data")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12), ("bfloat16", 2e-2)])
def test_the_start_is_the_specs_and_then_a_fresh_adamw_trains(dtype, tolerance):
    def schedule(count):
        return 1e-3 * (1 + count)

    with jax.enable_x64(dtype == "float64"):
        params, h = factors(dtype=dtype), weights(1)
        tx = lora_adamw(schedule, weight_decay=0.1, reg=None, loraplus_lr_ratio=2.0, start_steps=3)
        step, state = stepper(tx), tx.init(params)
        bias, adamw = params["bias"], optax.adamw(schedule, weight_decay=0.1)
        of_bias = adamw.init(bias)
        for number in range(3):
            assert int(state.steps) == number and not state.done
            noise = weights(10 + number)
            grads = gradients(params, {name: x + 0.1 * noise[name] for name, x in h.items()})
            before, old = params, state
            params, state = step(params, state, grads)
            assert_step_of_the_spec(before, grads, old, params, state, tolerance)
            update, of_bias = adamw.update(grads["bias"], of_bias, bias)
            bias = optax.apply_updates(bias, update)
        assert state.done and int(state.steps) == 3
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}

        def later(count):
            return schedule(count + 3)

        pairs = {name: params[name] for name in SHAPES}
        fresh = {
            side: optax.adamw(lambda n, k=k: k * later(n), weight_decay=0.1) for side, k in (("a", 1.0), ("b", 2.0))
        }
        labels = {name: {f"kernel_lora_{side}": side for side in "ab"} for name in SHAPES}
        plain = optax.partition(fresh, labels)
        moments = plain.init(pairs)
        for _ in range(3):
            grads = gradients(params, h)
            params, state = step(params, state, grads)
            updates, moments = plain.update({name: grads[name] for name in SHAPES}, moments, pairs)
            pairs = optax.apply_updates(pairs, updates)
            update, of_bias = adamw.update(grads["bias"], of_bias, bias)
            bias = optax.apply_updates(bias, update)
        assert int(state.steps) == 3
        for got, expected in zip(jax.tree.leaves(params), jax.tree.leaves({"bias": bias, **pairs}), strict=True):
            np.testing.assert_allclose(
                np.asarray(got, float), np.asarray(expected, float), rtol=tolerance, atol=tolerance
            )


def run(params, grads_of, steps: int) -> list[tuple[dict, DeferredState]]:
    state, history = AUTO.init(params), []
    for number in range(steps):
        params, state = auto_step(params, state, grads_of(params, number))
        history.append((params, state))
    return history


@pytest.mark.parametrize(("noise", "taken"), [(0.0, LEAST_STEPS), (100.0, MOST_STEPS)])
def test_auto_takes_the_steps_that_the_noise_needs_in_one_compilation(noise, taken):
    h = weights(1)

    def grads_of(params, number):
        drawn = weights(10 + number)
        return gradients(params, {name: x + noise * drawn[name] for name, x in h.items()})

    history = run(factors(), grads_of, MOST_STEPS + 2)
    for number, (_, state) in enumerate(history, 1):
        of_pairs = [of_pair for entry in states_of(state).values() for of_pair in entry]
        enough = number >= LEAST_STEPS and bool(settled(numpy_ops, min(number, taken), of_pairs))
        assert bool(state.done) == (enough or number >= MOST_STEPS) == (number >= taken)
        assert int(state.steps) == min(number, taken)
    assert auto_step._cache_size() == 1


def test_after_the_start_no_decomposition_is_computed():
    params = factors()

    def count(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "cond":
                started, trained = equation.params["branches"]  # by the value of done
                assert count(started.jaxpr) > 0
                total += count(trained.jaxpr)
                continue
            total += equation.primitive.name in ("qr", "geqrf", "householder_product", "svd", "cholesky")
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):
                    total += count(value.jaxpr)
        return total

    assert count(jax.make_jaxpr(AUTO.update)(params, AUTO.init(params), params).jaxpr) == 0


def test_a_common_factor_of_the_gradients_cancels_to_the_bit():
    def grads_of(factor):
        def scaled(params, _):
            grads = gradients(params, weights(1))
            return {name: x if name == "bias" else jax.tree.map(lambda y: y * factor, x) for name, x in grads.items()}

        return scaled

    (plain, state), (other, other_state) = (run(factors(), grads_of(f), LEAST_STEPS)[-1] for f in (1.0, 2.0**-20))
    assert state.done and other_state.done
    for got, expected in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(other_state.starts, state.starts, strict=True):
        np.testing.assert_array_equal(got.s, expected.s * 2.0**-20)
        np.testing.assert_array_equal(got.agreement, expected.agreement)


def test_steps_without_a_gradient_do_not_count_and_pairs_without_one_stay_plain():
    params, h = factors(), weights(1)

    def grads_of(tree, number):
        grads = gradients(tree, h)
        if number < 2:  # nothing to read: zero, and not a number
            pairs = {name: x for name, x in grads.items() if name != "bias"}
            return {**jax.tree.map(lambda x: x * (0.0, np.nan)[number], pairs), "bias": grads["bias"]}
        silent = jax.tree.map(jnp.zeros_like, grads["two"])
        return {**grads, "two": silent if number < LEAST_STEPS + 2 else grads["two"]}

    history = run(params, grads_of, LEAST_STEPS + 3)
    assert [int(state.steps) for _, state in history[:4]] == [0, 0, 1, 2]
    assert [bool(state.done) for _, state in history[-3:]] == [False, True, True]
    for name in SHAPES:
        np.testing.assert_array_equal(history[1][0][name]["kernel_lora_a"], params[name]["kernel_lora_a"])
    np.testing.assert_allclose(history[1][0]["bias"], params["bias"] - 0.02, atol=1e-6)  # trained from the first step
    started = history[-2][0]["two"]
    np.testing.assert_array_equal(started["kernel_lora_a"], params["two"]["kernel_lora_a"])
    np.testing.assert_array_equal(started["kernel_lora_b"], 0.0)
    g_b = gradients(history[-2][0], h)["two"]["kernel_lora_b"]
    np.testing.assert_allclose(history[-1][0]["two"]["kernel_lora_b"], -0.01 * np.sign(g_b), rtol=1e-4)  # Adam's first


@pytest.mark.feature("Gradient accumulation")
def test_steps_that_are_scanned_accumulated_clipped_and_donated_are_the_same():
    h = {name: jnp.asarray(x, jnp.float32) for name, x in weights(1).items()}
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1e9), AUTO), every_k_schedule=2)

    @partial(jax.jit, donate_argnums=(0, 1))
    def steps(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(gradients(params, h), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=2 * LEAST_STEPS + 4)[0]

    expected, state = run(factors(), lambda params, _: gradients(params, h), LEAST_STEPS + 2)[-1]
    params = factors()
    got, accumulated = steps(params, tx.init(params))
    assert params["one"]["kernel_lora_a"].is_deleted()
    assert bool(accumulated.inner_opt_state[1].done) and bool(state.done)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_optax_finds_what_belongs_to_the_parameters_in_the_state():
    state = AUTO.init(factors())
    mapped = optax.tree_map_params(AUTO, lambda x: x + 1, state)
    moments = (mapped.pairs.inner_state[1].mu, mapped.pairs.inner_state[1].nu, mapped.others.inner_state.mu)
    assert all((x == 1).all() for x in jax.tree.leaves(moments))
    assert all((x == 0).all() for x in jax.tree.leaves(mapped.starts)) and len(mapped.starts) == 2


def test_what_does_not_fit_is_refused():
    params = factors()
    state = AUTO.init(params)
    with pytest.raises(ConfigError, match=r"update\(updates, state, params\)"):
        AUTO.update(params, state)
    with pytest.raises(ConfigError, match='start_steps must be an integer >= 0 or "auto", got -1'):
        lora_adamw(start_steps=-1)
    bias = {"bias": jnp.ones(3)}
    with pytest.raises(ModelError, match="a start needs the factors of LoRA, got none in params"):
        AUTO.update(bias, AUTO.init(bias), bias)
    fewer = {name: x for name, x in params.items() if name != "two"}
    with pytest.raises(
        ModelError,
        match=r"another model: it has pairs of number and rank \[\(5, 4\), \(1, 4\)\], params \[\(4, 4\), \(",
    ):
        AUTO.update(fewer, state, fewer)
    with pytest.raises(ModelError, match="the state must be of an optimizer that makes the start, got a tuple"):
        AUTO.update(params, lora_adamw().init(params), params)
