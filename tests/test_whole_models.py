"""One set of weights in transformers, Flax and mlx-lm: the same numbers from the logits to fifty steps of training.

What is recorded and how nearly it must agree is in `benchmarks.agreement`, which prints it for everything. Here the
embedded model runs on smaller batches, with fewer targets and passes, and at half the rate.
"""

import importlib
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from benchmarks.agreement.compare import GIVEN_GRADIENTS, LOSSES, TOLERANCES, errors
from benchmarks.agreement.job import embedded, grouped, write_grouped
from benchmarks.agreement.record import record
from benchmarks.agreement.reference import reference
from lora_one import Config

FRAMEWORKS = {"float32": ("torch", "jax", "mlx"), "float64": ("torch", "jax")}
RUNS = [("grouped", "float32"), ("grouped", "float64"), ("embedded", "float32")]
PAIRS = [(*run, *pair) for run in RUNS for pair in combinations(FRAMEWORKS[run[1]], 2)]
SINGLES = [(*run, framework) for run in RUNS for framework in FRAMEWORKS[run[1]]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grouped")
    write_grouped(folder)
    # Each pair and each pass is more for XLA to compile; the random model has them all.
    config = Config(passes=2, targets=("v_proj", "down_proj"))
    return {"grouped": grouped(folder), "embedded": embedded(rows=4, learning_rate=5e-4, config=config)}


@pytest.fixture(scope="module")
def records(jobs):
    """(model, dtype, framework) -> its record, made once."""

    @cache
    def make(model, dtype, framework):
        runner = importlib.import_module(f"benchmarks.agreement.on_{framework}").Runner(dtype)
        return record(runner, jobs[model])

    return make


def quantities(job, dtype):
    """All that must have been compared."""
    return TOLERANCES[dtype].keys() - {f"start, pass {number}" for number in range(job.config.passes + 1, 4)}


@pytest.mark.parametrize(("model", "dtype", "one", "other"), PAIRS)
def test_two_frameworks_agree(records, jobs, model, dtype, one, other):
    a, b = records(model, dtype, one), records(model, dtype, other)
    assert a.keys() == b.keys()
    assert a["logits"].dtype == b["logits"].dtype == dtype
    for name in a:
        assert not name.startswith("weight/") or np.array_equal(a[name], b[name]), name
    assert len(a["losses"]) == 50
    found = errors(a, b, jobs[model].config.scaling)
    assert found.keys() == quantities(jobs[model], dtype)
    assert not {name: error for name, error in found.items() if not error <= TOLERANCES[dtype][name]}


@pytest.mark.parametrize(("model", "dtype", "framework"), SINGLES)
def test_numpy_in_float64_makes_the_same_of_a_frameworks_gradients(records, jobs, model, dtype, framework):
    found = records(model, dtype, framework)
    by_numpy = reference(found, jobs[model])
    errors_found = errors(found, by_numpy, jobs[model].config.scaling)
    of_the_model = {"logits", "loss", "gradient of the weights", LOSSES}
    assert errors_found.keys() == quantities(jobs[model], dtype) - of_the_model
    allowed = GIVEN_GRADIENTS[dtype]
    assert not {name: error for name, error in errors_found.items() if not error <= allowed}
    for name in (key for key in by_numpy if key.startswith(("A/", "B/"))):  # at each of the fifty steps
        difference = np.linalg.norm(found[name] - by_numpy[name], axis=(1, 2))
        assert (difference <= allowed * np.linalg.norm(by_numpy[name], axis=(1, 2))).all(), name


@pytest.mark.parametrize(("model", "dtype"), RUNS)
def test_what_agrees_is_a_model_that_learns(records, model, dtype):
    found = records(model, dtype, "torch")
    assert found["losses"][-5:].mean() < 0.95 * found["losses"][:5].mean()
    moved = {name for name in found if name.startswith("merged/") and not np.array_equal(
        found[name], found[name.replace("merged", "weight")])}  # fmt: skip
    assert moved == {f"merged/{name.removeprefix('A0/')}.weight" for name in found if name.startswith("A0/")}


LAYER = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("array", "expected"),
    {
        "logits": {"logits"},
        "loss": {"loss"},
        f"gradients/{LAYER}.bias": {"gradient of the weights"},
        f"start/3/{LAYER}": {"start, pass 3"},
        f"singular values/{LAYER}": {"singular values"},
        f"A0/{LAYER}": {"B0 A0", "effective weights, start"},
        "losses": {LOSSES},
        "merged/model.norm.weight": {"effective weights, end"},
    }.items(),
)
def test_a_difference_in_one_array_is_told_and_named(records, jobs, array, expected):
    right = records("grouped", "float64", "torch")
    wrong = {**right, array: right[array] * (1.0 + 1e-8)}
    found = errors(wrong, right, jobs["grouped"].config.scaling)
    assert {name for name, error in found.items() if error > TOLERANCES["float64"][name]} == expected
