"""One set of weights in transformers, Flax and mlx-lm, started by the optimizer: the same numbers for fifty steps."""

import importlib
from functools import cache
from itertools import combinations

import numpy as np
import pytest

import lora_one
from benchmarks.agreement.compare import GIVEN_GRADIENTS, LOSSES, TOLERANCES
from benchmarks.agreement.job import embedded
from lora_one import Config
from lora_one.backends import load_backend
from lora_one.core.deferred import start_state, start_step
from lora_one.core.factors import Factors

START_STEPS = 6
FRAMEWORKS = {"float32": ("torch", "jax", "mlx"), "float64": ("torch", "jax")}
PAIRS = [(dtype, *pair) for dtype, names in FRAMEWORKS.items() for pair in combinations(names, 2)]
SINGLES = [(dtype, name) for dtype, names in FRAMEWORKS.items() for name in names]
JOB = embedded(rows=4, learning_rate=5e-4, config=Config(targets=("v_proj", "down_proj")))


@cache
def trained(dtype: str, framework: str):
    """(weights, factors as they were attached, steps, report) of fifty steps, of which the first make the start."""
    runner = importlib.import_module(f"benchmarks.agreement.on_{framework}").Runner(dtype)
    with runner.precision():
        model = runner.open(JOB.model)
        weights = runner.weights(model)
        model, report = lora_one.init(model, config=JOB.config)
        attached = runner.factors(model)
        adamw = lora_one.optimizer(model, JOB.learning_rate, precondition=True, start_steps=START_STEPS)
        steps = list(runner.train(model, adamw, [runner.batch(batch) for batch in JOB.train_batches]))
        report.summary()  # fills it in, where no code of ours runs after a step
    return weights, attached, steps, report


def products(factors: dict[str, Factors]) -> np.ndarray:
    """B A of all layers, flat."""
    return np.concatenate([np.ravel(b.astype(np.float64) @ a) for a, b in (factors[name] for name in sorted(factors))])


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize(("dtype", "one", "other"), PAIRS)
def test_two_frameworks_agree(dtype, one, other):
    weights, attached, steps, report = trained(dtype, one)
    _, other_attached, other_steps, other_report = trained(dtype, other)
    allowed = TOLERANCES[dtype]
    assert len(steps) == len(other_steps) == 50
    for name, pair in attached.items():
        for x, y in zip(pair, other_attached[name], strict=True):
            np.testing.assert_allclose(x, y, rtol=2 * np.finfo(dtype).eps, atol=0)
    for number in range(START_STEPS):
        assert apart(products(steps[number].factors), products(other_steps[number].factors)) < allowed["B0 A0"], number
    losses, others = (np.array([step.loss for step in each]) for each in (steps, other_steps))
    assert (np.abs(losses - others) / others).max() < allowed[LOSSES]
    for name, pair in steps[-1].factors.items():
        update, other_update = (JOB.config.scaling * b @ a for a, b in (pair, other_steps[-1].factors[name]))
        weight = weights[f"{name}.weight"]
        assert apart(weight + update, weight + other_update) < allowed["effective weights, end"], name
    assert losses[-5:].mean() < 0.95 * losses[:5].mean()
    by_name = [sorted(each.layers, key=lambda layer: layer.name) for each in (report, other_report)]
    for layer, twin in zip(*by_name, strict=True):
        assert (layer.name, layer.start, report.done, report.steps) == (twin.name, "spectral", True, START_STEPS)
        np.testing.assert_allclose(layer.singular_values, twin.singular_values, atol=max(allowed["B0 A0"], 1e-6))
        assert abs(layer.agreement - twin.agreement) < max(allowed["B0 A0"], 1e-6)  # told in float32


@pytest.mark.parametrize(("dtype", "framework"), SINGLES)
def test_numpy_in_float64_makes_the_same_start_of_a_frameworks_gradients(dtype, framework):
    _, attached, steps, _ = trained(dtype, framework)
    ops = load_backend("numpy").ops
    for name, pair in attached.items():
        pair = Factors(*(x.astype(np.float64) for x in pair))
        state = start_state(ops, pair)
        for step in steps[:START_STEPS]:
            gradient = Factors(*(x.astype(np.float64) for x in step.gradients[name]))
            expected, state = start_step(ops, pair, gradient, state, JOB.config.first_gamma, JOB.config.balance)
            pair = Factors(
                *(x.astype(np.float64) for x in step.factors[name])
            )  # the gradients that follow are at these
            error = apart(pair.lora_B @ pair.lora_A, expected.lora_B @ expected.lora_A)
            assert error <= 10 * GIVEN_GRADIENTS[dtype], (name, error)
