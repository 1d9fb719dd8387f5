"""Data parallel over mx.distributed: two processes on the loopback, started by mlx.launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_one.core.fold import FoldState, merge_folds, of_mean
from tests.backends.mlx.models import tiny_mixtral, token_batches
from tests.backends.mlx.passes import distributed_worker
from tests.backends.mlx.passes.reading import NUMPY, assert_same, fold_pass

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of two processes, in folders 0 and 1."""
    path = tmp_path_factory.mktemp("processes")
    launch = Path(sys.executable).parent / "mlx.launch"
    command = [launch, "-n", "2", "--backend", "ring", "--", sys.executable, distributed_worker.__file__, path]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def files(folder, name):
    """A file of both processes, which agree to the bit on what is in it, beside that of one process."""
    one, first, second = (np.load(folder / who / f"{name}.npz") for who in ("alone", "0", "1"))
    assert first["batches"] == second["batches"] == one["batches"] == 4
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert first.files == second.files
    for key in first.files:
        np.testing.assert_array_equal(first[key], second[key])
    return one, first


@pytest.mark.feature("Several processes, whole model in each")
def test_two_processes_start_alike_and_as_one_process_would(folder):
    (folder / "alone").mkdir(exist_ok=True)
    distributed_worker.start(token_batches(count=4), folder / "alone")
    for name in distributed_worker.CONFIGS:
        one, both = files(folder, name)
        assert both["gamma"] == one["gamma"] and both.files == one.files
        for path in {key.rpartition(".")[0] for key in one.files if "." in key}:
            products = [_product(file, path) for file in (both, one)]
            error = np.linalg.norm(products[0] - products[1]) / np.linalg.norm(products[1])
            assert error < 1e-4, f"{name}, {path}: {error:.1e}"


def test_two_processes_read_both_sides_as_one_process_would_and_merge_their_folds(folder):
    (folder / "alone").mkdir(exist_ok=True)
    batches = token_batches(count=4)
    distributed_worker.read(batches, folder / "alone")
    one, both = files(folder, "sides")
    assert both.files == one.files
    for key in one.files:
        assert np.linalg.norm(both[key] - one[key]) <= 1e-5 * np.linalg.norm(one[key]), key
    one, both = files(folder, "fold")
    assert both.files == one.files
    (_, layers, first), (_, _, second) = (
        fold_pass(tiny_mixtral(experts=8), part) for part in (batches[:3], batches[3:])
    )
    alone = 0
    for layer in layers:
        states = [of_mean(NUMPY, x[layer.name], 1 / n) for x, n in ((first, 3), (second, 1)) if x[layer.name]]
        alone += len(states) == 1
        expected = states[0] if len(states) == 1 else merge_folds(NUMPY, *states)
        assert_same(FoldState(*(both[f"{layer.name}.{x}"] for x in FoldState._fields)), of_mean(NUMPY, expected, 4))
    assert alone > 0  # an expert that only one process has tokens for


ERRORS = {
    "a loss that is not finite": ("GradientError", "batch 1: the loss must be finite"),
    "an exception of the loss": ("KeyError", "no such column"),
    "an exception of the batches": ("OSError", "the disk is gone"),
    "no batches": ("BatchError", "at least one batch, got none"),
    "an unsuitable model": ("ModelError", "no such layer"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_one_process_is_an_error_in_both(folder, name):
    first, failing = (json.loads((folder / rank / "errors.json").read_text()) for rank in "01")
    error, message = ERRORS[name]
    assert failing[name][0] == error and message in failing[name][1]
    kind, text = first[name]
    assert kind == "ProcessError"
    assert f"lora_one.init failed on rank {distributed_worker.FAILING}: {error}: {failing[name][1]}"[:900] in text
    assert first["after that"] == failing["after that"] == ["", ""]


def test_a_process_alone_does_not_wait_for_ever(folder):
    kind, text = json.loads((folder / "0" / "errors.json").read_text())["one process alone"]
    assert kind == "ProcessError" and "one did not come within 1 s" in text


def test_both_processes_may_save_into_one_folder(folder):
    assert sorted(x.name for x in (folder / "adapter").iterdir())[:2] == ["adapter_config.json", "adapters.safetensors"]


def _product(file, path):
    a, b = (file[f"{path}.{name}"].astype(np.float64) for name in ("lora_a", "lora_b"))
    return b @ a if a.ndim == 3 else a @ b
