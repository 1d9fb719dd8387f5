"""The page on writing a backend holds what it says: its code runs as printed, and is held to the specification."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lora_one import Config
from lora_one.checkpoint.peft import read_adapter, read_folder
from lora_one.conformance import check_backend
from lora_one.core.exact import exact_spectrum
from lora_one.core.factors import Factors, gradient_factors, normalized_factors
from lora_one.core.fold import finish_fold, fold, of_mean, read_both_sides, start_fold
from lora_one.core.omega import draw_omega
from lora_one.core.sides import Products
from lora_one.core.step import adamw, start_pair
from lora_one.errors import BatchError, CheckpointError, ConfigError, ModelError
from lora_one.initialization import initialize

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending" / "backend.md").read_text(encoding="utf-8")
CODE = "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
SIZES = {"up": (48, 40), "down": (30, 48)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("backend") / "numpy_backend.py"
    file.write_text(CODE, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def backend(source):
    spec = importlib.util.spec_from_file_location("numpy_backend", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(backend):
    rng = np.random.default_rng(0)
    return backend.MLP(**{name: rng.standard_normal(size) / 7.0 for name, size in SIZES.items()})


@pytest.fixture
def batches():
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((16, 40)), rng.standard_normal((16, 30))) for _ in range(3)]


def loss_of(weights, batches):
    """The mean loss by the textbook: no layer, no backward pass."""
    losses = [((np.tanh(x @ weights["up"].T) @ weights["down"].T - y) ** 2).sum() / (2 * len(x)) for x, y in batches]
    return sum(losses) / len(losses)


def true_gradients(weights, batches):
    """dL/dW of both layers by hand, the mean over the batches."""
    gradients = {name: np.zeros(size) for name, size in SIZES.items()}
    for x, y in batches:
        hidden = np.tanh(x @ weights["up"].T)
        error = (hidden @ weights["down"].T - y) / len(x)
        gradients["down"] += error.T @ hidden / len(batches)
        gradients["up"] += ((error @ weights["down"]) * (1.0 - hidden**2)).T @ x / len(batches)
    return gradients


def weights_of(model):
    return {name: layer.weight.copy() for name, layer in model.linear.items()}


def begin(backend, model, batches, config, loss_fn=None):
    with backend.open_session(model, batches, loss_fn, config) as session:
        return initialize(session, config, "numpy", time.perf_counter())


def assert_pairs_equal(model, expected):
    for name, pair in expected.items():
        for factor, answer in zip(model.linear[name].lora.pair, pair, strict=True):
            np.testing.assert_allclose(factor, answer, rtol=0, atol=1e-10 * np.abs(answer).max())


def test_the_gradients_by_hand_are_those_of_the_loss(model, batches):
    weights, gradients, rng = weights_of(model), true_gradients(weights_of(model), batches), np.random.default_rng(2)
    for name in SIZES:
        direction, step = rng.standard_normal(SIZES[name]), 1e-5
        ahead, behind = ({**weights, name: weights[name] + sign * step * direction} for sign in (1, -1))
        slope = (loss_of(ahead, batches) - loss_of(behind, batches)) / (2 * step)
        assert slope == pytest.approx((gradients[name] * direction).sum(), rel=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_operations_pass_the_suite(backend, dtype):
    assert check_backend(backend.ops, like=np.zeros((), dtype)).passed


@pytest.mark.parametrize("scale", ["normalized", "gradient"])
def test_an_exact_start_is_the_specification_s(backend, model, batches, scale):
    before = weights_of(model)
    gradients = true_gradients(before, batches)
    config = Config(rank=4, gradient="exact", scale=scale, eta=0.5)
    report = begin(backend, model, batches, config)
    expected = {}
    for name, gradient in gradients.items():
        spectrum = exact_spectrum(backend.ops, gradient, 4)
        expected[name] = (
            normalized_factors(backend.ops, spectrum, 128.0)
            if scale == "normalized"
            else gradient_factors(backend.ops, spectrum, 0.5)
        )
    assert_pairs_equal(model, expected)
    assert report.base_loss == pytest.approx(loss_of(before, batches), rel=1e-12)
    assert all(np.array_equal(layer.weight, before[name]) for name, layer in model.linear.items())


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_sketched_start_is_the_specification_s(backend, model, batches, passes):
    """The width is far below the layers' sizes: nothing is seen whole."""
    ops, config, weights = backend.ops, Config(rank=2, oversample=3, passes=passes, seed=5), weights_of(model)
    expected = {}
    for name, whole in true_gradients(weights, batches).items():
        columns = whole.shape[1]
        state = start_fold(ops, draw_omega(5, name, columns, 5), len(whole), draw_omega(5, f"{name}, test", columns, 8))
        for batch in batches:
            state = fold(ops, state, true_gradients(weights, [batch])[name])
        state = of_mean(ops, state, len(batches))
        for _ in range(1, passes):
            state = read_both_sides(ops, state, Products(whole @ state.v, whole.T @ state.u))
        expected[name] = normalized_factors(ops, finish_fold(ops, state, 2), 128.0)
    report = begin(backend, model, batches, config)
    assert_pairs_equal(model, expected)
    assert (report.passes, report.batches) == (passes, 3)


def test_gamma_auto_reads_the_loss_of_the_started_model(backend, model, batches):
    report = begin(backend, model, batches, Config(rank=4, gamma="auto"))
    weights = {
        name: w.weight + w.lora.scaling * w.lora.pair.lora_B @ w.lora.pair.lora_A for name, w in model.linear.items()
    }
    assert report.gamma_trials[-1].loss == pytest.approx(loss_of(weights, batches), rel=1e-12)


@pytest.mark.parametrize("call", [1, 3, 5])
def test_an_exception_leaves_the_model_as_it_was(backend, model, batches, call):
    before, calls = weights_of(model), []

    def failing(model, batch):
        calls.append(batch)
        if len(calls) == call:
            raise KeyboardInterrupt
        return backend.squared_error(model, batch)

    with pytest.raises(KeyboardInterrupt):
        begin(backend, model, batches, Config(rank=2, passes=2), failing)
    assert all(
        np.array_equal(layer.weight, before[name]) and layer.lora is None for name, layer in model.linear.items()
    )


def test_what_cannot_be_is_an_error_and_changes_nothing(backend, model, batches):
    for error, config, data in [
        (ModelError, Config(rank=31), batches),
        (ModelError, Config(targets=["missing"]), batches),
        (ConfigError, Config(dropout=0.1), batches),
        (ConfigError, Config(modules_to_save=["down"]), batches),
        (BatchError, Config(), []),
        (BatchError, Config(passes=2), iter(batches)),
    ]:
        with pytest.raises(error):
            begin(backend, model, data, config)
        assert all(layer.lora is None for layer in model.linear.values())


def test_plain_lora_changes_no_output(backend, model, batches):
    loss = backend.squared_error(model, batches[0])
    backend.attach_plain(model, Config(rank=4))
    assert backend.squared_error(model, batches[0]) == loss
    assert all(layer.lora.pair.lora_A.std() > 0 for layer in model.linear.values())


@pytest.mark.parametrize("precondition", [False, True])
def test_the_optimizer_is_the_specification_s_adamw(backend, model, batches, precondition):
    begin(backend, model, batches, Config(rank=4))
    pairs = {name: layer.lora.pair for name, layer in model.linear.items()}
    states = {name: start_pair(backend.ops, pair) for name, pair in pairs.items()}
    trainer = backend.optimizer(model, learning_rate=1e-2, precondition=precondition)
    losses = []
    for batch in batches * 2:
        losses.append(backend.squared_error(model, batch))
        for name, layer in model.linear.items():
            reg = 1e-6 if precondition else None
            gradient = Factors(*(x.copy() for x in layer.gradient))
            pairs[name], states[name] = adamw(backend.ops, pairs[name], gradient, states[name], 1e-2, reg=reg)
        trainer.step()
    assert_pairs_equal(model, pairs)
    assert losses[3] < losses[0]


def test_a_folder_gives_the_same_factors_back(backend, model, batches, tmp_path):
    begin(backend, model, batches, Config(rank=4))
    backend.save(model, tmp_path)
    for name, layer in read_adapter(read_folder(tmp_path)).layers.items():
        assert layer.scaling == pytest.approx(model.linear[name].lora.scaling, rel=1e-15)
        assert all(map(np.array_equal, layer.pairs[0], model.linear[name].lora.pair))
    base = backend.MLP(**weights_of(model))
    backend.load(base, tmp_path, trainable=False)
    assert backend.squared_error(base, batches[0]) == pytest.approx(backend.squared_error(model, batches[0]), rel=1e-14)
    with pytest.raises(CheckpointError, match="down: lora_B must be"):
        backend.load(backend.MLP(np.zeros((48, 40)), np.zeros((29, 48))), tmp_path, trainable=False)


def test_merging_adds_the_product_to_the_weight(backend, model, batches):
    begin(backend, model, batches, Config(rank=4))
    expected = {
        name: w.weight + w.lora.scaling * w.lora.pair.lora_B @ w.lora.pair.lora_A for name, w in model.linear.items()
    }
    backend.merge(model)
    for name, layer in model.linear.items():
        np.testing.assert_allclose(layer.weight, expected[name], rtol=0, atol=1e-15)
        assert layer.lora is None
    with pytest.raises(ModelError):
        backend.merge(model)


def test_peft_opens_the_folder_and_computes_the_same(backend, model, batches, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    begin(backend, model, batches, Config(rank=4))
    backend.save(model, tmp_path)
    layers = {name: torch.nn.Linear(size[1], size[0], bias=False) for name, size in SIZES.items()}
    base = torch.nn.ModuleDict(layers).double()
    for name, layer in model.linear.items():
        base[name].weight.data = torch.tensor(layer.weight)
    base.forward = lambda x: base["down"](torch.tanh(base["up"](x)))
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path), autocast_adapter_dtype=False)
    x, y = batches[0]
    error = adapted(torch.tensor(x)) - torch.tensor(y)
    assert float((error**2).sum() / (2 * len(x))) == pytest.approx(backend.squared_error(model, batches[0]), rel=1e-12)


# Other backends stay unread: they would bring their frameworks, and minutes.
MYPY_CONFIG = """
[mypy]
disallow_untyped_defs = true
check_untyped_defs = true
ignore_missing_imports = true
follow_imports = silent
[mypy-lora_one.backends.torch.*,lora_one.backends.jax.*,lora_one.backends.mlx.*]
follow_imports = skip
"""


def test_mypy_holds_the_module_to_the_protocol(source, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(MYPY_CONFIG, encoding="utf-8")
    (tmp_path / "held.py").write_text(
        "import numpy_backend\nfrom lora_one.backends.interface import Backend\nbackend: Backend = numpy_backend\n",
        encoding="utf-8",
    )
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "held.py", str(source)],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": os.pathsep.join([str(source.parent), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
