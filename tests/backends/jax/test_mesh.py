"""Meshes of 8 devices, in a process of their own: the number of devices is fixed when JAX starts."""

import json
import os
import subprocess
import sys

import pytest

SHAPES = {"data-parallel": "8x1", "tensor-parallel": "1x8", "two-dimensional": "2x4"}
CASES = [f"{shape}:{kind}" for shape in SHAPES.values() for kind in ("auto", "explicit")]
DEFERRED = [f"deferred:{kind}" for kind in ("auto", "no context", "explicit")]
WEIGHT = 64 * 64  # elements of each kernel, and of each full gradient
THIN = 16 * 64  # of the activations, 16 rows; of a factor 8 columns wide, 8 * 64


@pytest.fixture(scope="module")
def results():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-m", "tests.backends.jax.mesh_script", *CASES, *DEFERRED, "indivisible:mesh"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.feature("Sharded weights")
@pytest.mark.parametrize("case", CASES)
def test_factors_are_those_of_one_device_and_the_base_stays(results, case):
    assert max(results[case]["error"].values()) < 1e-5
    assert results[case]["base_kept"]


@pytest.mark.parametrize("case", CASES)
def test_factors_take_the_kernels_sharding_in_array_and_metadata(results, case):
    assert results[case]["specs"] == {
        "up.a": [[None, None]] * 2,
        "up.b": [[None, "model"]] * 2,
        "down.a": [["model", None]] * 2,
        "down.b": [[None, None]] * 2,
        "heads.a": [[None, None]] * 2,
        "heads.b": [[None, "model", None]] * 2,
    }


@pytest.mark.parametrize("case", CASES)
def test_no_device_gets_a_full_weight_or_a_full_gradient(results, case):
    """From the compiled module: all that devices send each other is thin factors' gradients, and activations."""
    largest = max(results[case]["gradients"].values(), default=0)
    assert largest <= THIN < WEIGHT
    assert "all-gather" not in results[case]["gradients"]


@pytest.mark.parametrize("case", CASES)
def test_rows_that_several_devices_share_are_not_folded(results, case):
    assert not results[case]["folds"]


@pytest.mark.parametrize("case", CASES)
def test_one_compilation_serves_all_batches_of_a_pass(results, case):
    """The second pass reads fewer directions than the first: the test columns are known by then."""
    assert results[case]["traces"] == [2, 2]


@pytest.mark.parametrize("case", CASES)
def test_the_optimizer_keeps_the_sharding_and_sends_r_by_r_matrices_only(results, case):
    sent = results[case]["optimizer"]
    assert set(sent) <= {"all-reduce"}
    assert max(sent.values(), default=0) <= 2 * 4 * 4
    assert results[case]["sharding_kept"]
    assert results[case]["stepped"] < 1e-6


@pytest.mark.parametrize("case", DEFERRED)
def test_a_start_without_data_is_that_of_one_device_and_keeps_each_pairs_sharding(results, case):
    assert results[case]["error"] < 1e-4
    assert results[case]["kept"]
    assert "3 layers, started from the gradients of the first 2 steps" in results[case]["report"]


def test_a_mesh_that_does_not_divide_is_an_error(results):
    assert (
        "layers.0: its kernel (8, 12) has out_sharding (None, 'model'), but mesh axis 'model' has 8"
        in (results["indivisible:mesh"])
    )
