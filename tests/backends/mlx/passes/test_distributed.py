"""Data parallel over mx.distributed: two processes on the loopback, started by mlx.launch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.backends.mlx.models import token_batches
from tests.backends.mlx.passes import distributed_worker

ROOT = Path(__file__).parents[4]


def test_two_processes_start_alike_and_as_one_process_would(tmp_path):
    launch = Path(sys.executable).parent / "mlx.launch"
    command = [launch, "-n", "2", "--backend", "ring", "--", sys.executable, distributed_worker.__file__, tmp_path]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    alone = tmp_path / "alone"
    alone.mkdir()
    distributed_worker.start(token_batches(count=4), alone)
    for name in distributed_worker.CONFIGS:
        one, first, second = (np.load(tmp_path / who / f"{name}.npz") for who in ("alone", "0", "1"))
        assert first["batches"] == second["batches"] == one["batches"] == 4
        assert first["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert first["gamma"] == second["gamma"] == one["gamma"]
        for key in one.files:
            np.testing.assert_array_equal(first[key], second[key])
        for path in {key.rpartition(".")[0] for key in one.files if "." in key}:
            products = [_product(file, path) for file in (first, one)]
            error = np.linalg.norm(products[0] - products[1]) / np.linalg.norm(products[1])
            assert error < 1e-6, f"{name}, {path}: {error:.1e}"


def _product(file, path):
    a, b = (file[f"{path}.{name}"].astype(np.float64) for name in ("lora_a", "lora_b"))
    return b @ a if a.ndim == 3 else a @ b
