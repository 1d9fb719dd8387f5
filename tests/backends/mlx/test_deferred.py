"""A start of the first gradients, on MLX, against core.deferred in float64."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

import lora_one
from lora_one.backends.numpy import ops as numpy_ops
from lora_one.backends.waiting import report_of
from lora_one.core import step
from lora_one.core.deferred import LEAST_STEPS, MOST_STEPS, settled, start_state, start_step
from lora_one.core.factors import Factors
from lora_one.errors import ConfigError, ModelError, ZeroGradientWarning
from tests.backends.mlx.models import modules_of, tiny_llama, warned

RANK, GAMMA, RATE = 2, 128.0, 1e-3


class Mixed(nn.Module):
    """Two dense layers of equal shapes, one of another, three experts, and a parameter outside of pairs."""

    def __init__(self):
        super().__init__()
        mx.random.seed(0)
        self.dense = [LoRALinear.from_base(nn.Linear(12, 10), r=RANK, scale=s) for s in (2.0, 0.5)]
        self.wide = LoRALinear.from_base(nn.Linear(6, 9), r=RANK, scale=1.0)
        self.experts = LoRASwitchLinear.from_base(SwitchLinear(8, 7, 3), r=RANK, scale=3.0)
        self.freeze()
        for module in (*self.dense, self.wide, self.experts):
            module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        self.bias = mx.zeros(5)


SHAPES = {"dense.0": (10, 12), "dense.1": (10, 12), "wide": (9, 6), "experts": (3, 7, 8)}
SCALES = {"dense.0": 2.0, "dense.1": 0.5, "wide": 1.0, "experts": 3.0}


def gradients_of_weights(steps: int, noise: float, seed: int = 0) -> list[dict[str, mx.array]]:
    """dL/dW of each layer at each step: the same matrix at all steps, and noise."""
    rng = np.random.default_rng(seed)
    constant = {path: rng.standard_normal(shape) for path, shape in SHAPES.items()}
    return [
        {path: mx.array(g + noise * rng.standard_normal(g.shape), mx.float32) for path, g in constant.items()}
        for _ in range(steps)
    ]


def linear_loss(model, gradients):
    """A loss whose gradient with respect to the layers' weights is the batch, and 1 with respect to the bias."""
    modules = modules_of(model)
    total = mx.sum(model.bias)
    for path, g in gradients.items():
        module = modules[path]
        a, b = module.lora_a, module.lora_b
        product = b @ a if a.ndim == 3 else b.T @ a.T
        total = total + module.scale * mx.sum(g * product)
    return total


def run(model, optimizer, batches, compiled=False, loss=linear_loss):
    """Train, and return the factors after each step, and how often the loss was traced."""
    traces = []

    def counted(model, batch):
        traces.append(1)
        return loss(model, batch)

    loss_and_gradient = nn.value_and_grad(model, counted)
    state = [model.state, optimizer.state]

    def one(batch):
        value, gradients = loss_and_gradient(model, batch)
        optimizer.update(model, gradients)
        return value

    one = mx.compile(one, inputs=state, outputs=state) if compiled else one
    history = []
    for batch in batches:
        mx.eval(one(batch), state)
        history.append({name: np.array(x) for name, x in tree_flatten(model.trainable_parameters())})
    return history, len(traces)


def pairs_of(arrays) -> dict[str, Factors]:
    """The pairs of `Mixed`, in float64 and PEFT's layout: experts one by one."""
    pairs = {}
    for path in SHAPES:
        a, b = (np.asarray(arrays[f"{path}.{name}"]).astype(np.float64) for name in ("lora_a", "lora_b"))
        if a.ndim == 3:
            pairs.update({f"{path}[{e}]": Factors(a[e], b[e]) for e in range(len(a))})
        else:
            pairs[path] = Factors(a.T, b.T)
    return pairs


class Reference:
    """The training in float64, by NumPy."""

    def __init__(self, model, least, most):
        self.pairs = pairs_of(dict(tree_flatten(model.trainable_parameters())))
        self.states = {name: start_state(numpy_ops, pair) for name, pair in self.pairs.items()}
        self.moments = {name: step.start_pair(numpy_ops, pair) for name, pair in self.pairs.items()}
        self.least, self.most, self.steps, self.done = least, most, 0, False

    def update(self, gradients):
        for name, pair in self.pairs.items():
            path, _, expert = name.partition("[")
            g = np.array(gradients[path]).astype(np.float64)
            g = SCALES[path] * (g[int(expert[:-1])] if expert else g)
            gradient = Factors(pair.lora_B.T @ g, g @ pair.lora_A.T)
            if self.done:
                self.pairs[name], self.moments[name] = step.adamw(
                    numpy_ops, pair, gradient, self.moments[name], RATE, reg=None
                )
            else:
                self.pairs[name], self.states[name] = start_step(numpy_ops, pair, gradient, self.states[name], GAMMA)
        if not self.done:
            self.steps += 1
            enough = self.steps >= self.least and settled(numpy_ops, self.steps, list(self.states.values()))
            self.done = self.steps == self.most or bool(enough)


def assert_close(arrays, pairs, tolerance=2e-5):
    for name, pair in pairs_of(arrays).items():
        for got, expected in zip(pair, pairs[name], strict=True):
            assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected), name


@pytest.mark.feature("Start without data")
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize(
    ("start_steps", "noise", "steps"), [(3, 0.5, 3), ("auto", 0.05, LEAST_STEPS), ("auto", 20.0, MOST_STEPS)]
)
def test_each_step_equals_core_in_float64(start_steps, noise, steps, compiled):
    model = Mixed()
    optimizer = lora_one.optimizer(model, RATE, start_steps=start_steps)
    bounds = (LEAST_STEPS, MOST_STEPS) if start_steps == "auto" else (start_steps, start_steps)
    reference = Reference(model, *bounds)
    batches = gradients_of_weights(MOST_STEPS + 4, noise)
    history, traces = run(model, optimizer, batches, compiled)
    assert traces == (bounds[1] + 1 if compiled else len(batches))
    for batch, arrays in zip(batches, history, strict=True):
        reference.update(batch)
        assert_close(arrays, reference.pairs)
    assert reference.steps == steps
    report = report_of(model)
    assert "started from the gradients of the first" in report.summary()
    assert (report.done, report.steps) == (True, steps)
    for layer in report.layers:
        s, agreement = reference.states[layer.name]
        np.testing.assert_allclose(layer.singular_values, s / s[0], atol=1e-5)
        assert layer.agreement == pytest.approx(float(agreement), abs=1e-5)


@pytest.mark.parametrize(("precondition", "ratio"), [(False, 1.0), (True, 1.0), (True, 4.0)])
@pytest.mark.parametrize("start_steps", [2, "auto"])
def test_after_the_start_pairs_are_trained_as_by_a_new_optimizer(start_steps, precondition, ratio):
    model, steps = Mixed(), LEAST_STEPS if start_steps == "auto" else start_steps
    batches = gradients_of_weights(MOST_STEPS + 2, 0.05)
    settings = {"weight_decay": 0.1, "precondition": precondition, "reg": 1e-3, "loraplus_lr_ratio": ratio}
    optimizer = lora_one.optimizer(model, RATE, start_steps=start_steps, **settings)
    run(model, optimizer, batches[:steps])
    fresh = Mixed()
    fresh.update(model.trainable_parameters())
    fresh.bias = mx.zeros(5)
    of_fresh = lora_one.optimizer(fresh, RATE, start_steps=0, **settings)
    for got, expected in zip(
        run(model, optimizer, batches[steps:])[0], run(fresh, of_fresh, batches[steps:])[0], strict=True
    ):
        for name in expected.keys() - {"bias"}:
            np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_no_start_is_plain_adamw_of_mlx():
    batches = gradients_of_weights(5, 0.5)
    model, other = Mixed(), Mixed()
    got, _ = run(model, lora_one.optimizer(model, RATE), batches)
    of_mlx = mlx.optimizers.AdamW(RATE, weight_decay=0.0, bias_correction=True)
    of_mlx.init(other.trainable_parameters())
    expected, _ = run(other, of_mlx, batches)
    for name, value in expected[-1].items():
        np.testing.assert_allclose(got[-1][name], value, atol=1e-5, err_msg=name)
    assert report_of(model) is None


@pytest.mark.feature("Learning-rate schedules")
def test_parameters_outside_of_pairs_are_trained_from_the_first_step_and_the_schedule_runs_on():
    model = Mixed()
    schedule = mlx.optimizers.linear_schedule(1e-2, 0.0, 10)
    history, _ = run(model, lora_one.optimizer(model, schedule, start_steps=3), gradients_of_weights(5, 0.1))
    # The gradient of the bias is 1 at each step, so AdamW subtracts the learning rate.
    expected = -np.cumsum([schedule(mx.array(step)).item() for step in range(5)])
    np.testing.assert_allclose([arrays["bias"][0] for arrays in history], expected, rtol=1e-5)


@pytest.mark.parametrize("start_steps", [4, "auto"])
def test_a_common_factor_of_the_gradients_changes_no_bit(start_steps):
    steps = LEAST_STEPS if start_steps == "auto" else start_steps
    histories = []
    for factor in (1.0, 2.0**-9, 2.0**13):
        model = Mixed()
        batches = tree_map(lambda g, factor=factor: g * factor, gradients_of_weights(steps, 0.1))
        histories.append(run(model, lora_one.optimizer(model, start_steps=start_steps), batches)[0][-1])
    for other in histories[1:]:
        for name in histories[0].keys() - {"bias"}:
            np.testing.assert_array_equal(other[name], histories[0][name], err_msg=name)


def test_a_pair_without_gradient_keeps_plain_lora_and_is_named():
    model = Mixed()
    start = {name: np.array(x) for name, x in tree_flatten(model.trainable_parameters())}
    optimizer = lora_one.optimizer(model, RATE, start_steps=3)
    report = report_of(model)

    def without(batches):
        still = {"wide": mx.zeros((9, 6)), "experts": mx.array([1.0, 0.0, 1.0])[:, None, None]}
        return [{**g, "wide": still["wide"], "experts": g["experts"] * still["experts"]} for g in batches]

    batches = gradients_of_weights(4, 0.1)
    assert report.layers[0].start == "waiting"
    after = run(model, optimizer, without(batches[:3]))[0][-1]
    np.testing.assert_array_equal(after["wide.lora_a"], start["wide.lora_a"])
    np.testing.assert_array_equal(after["experts.lora_a"][1], start["experts.lora_a"][1])
    assert not after["wide.lora_b"].any() and not after["experts.lora_b"][1].any()
    assert np.abs(after["experts.lora_a"][0] - start["experts.lora_a"][0]).max() > 1e-3
    with warned(ZeroGradientWarning) as messages:
        print(report)
        print(report)
    assert len(messages) == 1 and "2 of 6 layers" in messages[0] and "wide, experts[1]" in messages[0]
    assert report.plain_layers == ["wide", "experts[1]"]
    trained = run(model, optimizer, batches[3:])[0][-1]  # AdamW's first step is lr * sign
    np.testing.assert_allclose(np.abs(trained["wide.lora_b"]), RATE, rtol=1e-3)


def test_gradients_of_some_pairs_only():
    model = Mixed()
    start = {name: np.array(x) for name, x in tree_flatten(model.trainable_parameters())}
    optimizer = lora_one.optimizer(model, RATE, start_steps=2)
    gradients = nn.value_and_grad(model, linear_loss)(model, gradients_of_weights(1, 0.1)[0])[1]
    optimizer.update(model, {"dense": gradients["dense"]})
    after = {name: np.array(x) for name, x in tree_flatten(model.trainable_parameters())}
    assert {name.partition(".")[0] for name in start if not np.array_equal(start[name], after[name])} == {"dense"}


@pytest.mark.parametrize(("start_steps", "before"), [(5, 3), ("auto", 3), ("auto", LEAST_STEPS), ("auto", 9)])
def test_saved_and_resumed_in_the_middle_is_the_same_to_the_bit(start_steps, before, tmp_path):
    batches = gradients_of_weights(MOST_STEPS + 2, 0.05 if before == 9 else 20.0)
    straight = Mixed()
    expected, _ = run(straight, lora_one.optimizer(straight, RATE, start_steps=start_steps), batches, compiled=True)

    first = Mixed()
    optimizer = lora_one.optimizer(first, RATE, start_steps=start_steps)
    run(first, optimizer, batches[:before], compiled=True)
    mx.save_safetensors(str(tmp_path / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(first.trainable_parameters())))

    second = Mixed()
    optimizer = lora_one.optimizer(second, RATE, start_steps=start_steps)
    second.load_weights(str(tmp_path / "model.safetensors"), strict=False)
    optimizer.state = tree_unflatten(list(mx.load(str(tmp_path / "optimizer.safetensors")).items()))
    report = report_of(second)
    report.summary()
    assert report.steps == (LEAST_STEPS if before == 9 else before)
    got, _ = run(second, optimizer, batches[before:], compiled=True)
    for name, value in expected[-1].items():
        np.testing.assert_array_equal(got[-1][name], value, err_msg=name)


def test_a_finished_start_resumes_without_start_steps():
    batches = gradients_of_weights(6, 0.1)
    straight, model = Mixed(), Mixed()
    expected, _ = run(straight, lora_one.optimizer(straight, RATE, start_steps=2), batches)
    optimizer = lora_one.optimizer(model, RATE, start_steps=2)
    run(model, optimizer, batches[:3])
    resumed = lora_one.optimizer(model, RATE)
    resumed.state = tree_map(mx.array, optimizer.state)
    got, _ = run(model, resumed, batches[3:])
    for name, value in expected[-1].items():
        np.testing.assert_array_equal(got[-1][name], value, err_msg=name)


def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing():
    model = Mixed()
    optimizer = lora_one.optimizer(model, start_steps=4)
    other = lora_one.optimizer(lora_one.init(tiny_llama())[0])
    before = optimizer.state
    with pytest.raises(ModelError, match=r"another start.*16 steps to go, of 4 here"):
        optimizer.state = other.state
    with pytest.raises(
        ModelError, match=r"another start.*16 steps to go, of 4 here, and other shapes in 1 arrays.*done"
    ):
        optimizer.state = lora_one.optimizer(model, start_steps="auto").state
    with pytest.raises(ModelError, match="has no start, but this optimizer is to make one"):
        optimizer.state = lora_one.optimizer(model, start_steps=0).state
    with pytest.raises(ModelError, match="4 steps to go, of 0 here"):
        lora_one.optimizer(model, start_steps=0).state = optimizer.state
    assert optimizer.state is before
    assert optimizer.progress["clock"].shape == (4,)


def test_the_report_outlives_the_optimizer():
    model = Mixed()
    run(model, lora_one.optimizer(model, start_steps=2), gradients_of_weights(3, 0.1))
    report = report_of(model)
    report.summary()
    assert (report.done, report.steps) == (True, 2)
    assert lora_one.optimizer(model).progress.keys() == {"steps", "s", "agreement"}  # trained: no second start


def test_misuse_is_an_error():
    model = Mixed()
    with pytest.raises(ConfigError, match="start_steps must be an integer >= 0"):
        lora_one.optimizer(model, start_steps=-1)
    model.dense[1].lora_b = mx.ones((RANK, 10))
    model.experts.lora_b[2] = 1.0
    with pytest.raises(ModelError, match=r"another B in 2 layers: dense.1, experts\[2\]; .* start_steps=0"):
        lora_one.optimizer(model, start_steps=6)
    plain = tiny_llama()
    with pytest.raises(ModelError, match="start_steps needs trainable LoRA layers of mlx-lm, got none"):
        lora_one.optimizer(plain, start_steps=6)
    made = lora_one.optimizer(model)
    with pytest.raises(ModelError, match="must come before lora_one"):
        lora_one.init(model)
    assert made.state.keys() >= {"step", "learning_rate"}
