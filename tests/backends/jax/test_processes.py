"""Two processes of `jax.distributed` and meshes over both: the numbers of one device, and errors in both."""

import os
import pickle
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.backends.jax import processes_worker as worker


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process returns; references and all."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", worker.__name__, address, str(rank), str(folder)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=500)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(text[-4000:] for text in texts)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def reference(results, training):
    return next(x[f"alone: {training}"] for x in results if f"alone: {training}" in x)


def assert_close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert np.abs(got[name] - array).max() <= tolerance * np.abs(array).max(), name


SCALING = worker.EXACT.scaling
CASES = {"fsdp": "two passes", "tensor": "exact, preconditioned", "without data": "without data"}


@pytest.mark.feature("Several processes, whole model in each")
@pytest.mark.feature("Sharded weights")
@pytest.mark.feature("Tensor parallel")
@pytest.mark.parametrize("case", CASES)
def test_start_losses_and_training_are_those_of_one_device(results, case):
    alone = reference(results, CASES[case])
    for of_process in results:
        got = of_process[case]
        if case != "without data":  # there the start is zero
            assert_close(got["start"], alone["start"])
        np.testing.assert_allclose(got["losses"], alone["losses"], rtol=1e-5)
        assert_close(got["end"], alone["end"])


def test_an_adapter_is_written_once_and_whole_and_opens_on_one_device_and_on_another_mesh(results):
    for of_process in results:
        got = of_process["fsdp"]
        assert got["written"]
        assert_close(got["loaded alone"], got["end"], 1e-6)
        assert_close(got["loaded"], got["end"], 1e-6)
        assert "'model'" in got["spec"]


def test_orbax_restores_the_factors_on_a_mesh_of_another_shape(results):
    for of_process in results:
        assert_close(of_process["fsdp"]["restored"], of_process["fsdp"]["end"], 1e-6)


def test_merge_adds_the_product_to_the_sharded_weights(results):
    kernels = results[0]["trees"]["kernels"]
    for of_process in results:
        got = of_process["fsdp"]
        assert_close(got["merged"], {name: kernels[name] + SCALING * x for name, x in got["end"].items()}, 1e-6)
        merged = {name: kernels[name] + SCALING * x for name, x in of_process["trees"]["tree"].items()}
        assert_close(of_process["trees"]["tree, merged"], merged, 1e-6)


@pytest.mark.parametrize(
    "case",
    ["tree", "Linen", "tree, loaded", "Linen, loaded", "the same numbers on each host", "a model on each host"],
)
def test_models_of_other_kinds_start_as_on_one_device(results, case):
    alone = reference(results, "exact, preconditioned")["start"]
    for of_process in results:
        assert_close(of_process["trees"][case], alone)


def test_the_preconditioner_sends_r_by_r_matrices_only(results):
    sent = results[0]["tensor"]["sent"]
    assert set(sent) == {"all-reduce"}
    assert max(sent.values()) <= 2 * 4 * 4


def test_every_process_hears_of_a_start_without_data(results):
    for of_process in results:
        report = of_process["without data"]["report"]
        assert "2 layers, started from the gradients of the first 2 steps" in report


# Name -> the failing process's own error, and what it says.
ERRORS = {
    "an exception of the loss": ("KeyError", "no such column"),
    "an exception of the batches": ("OSError", "the disk is gone"),
    "no batches": ("BatchError", "at least one batch, got none"),
    "an unsuitable model": ("ModelError", "rank"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_one_process_is_an_error_in_both(results, name):
    error, message = ERRORS[name]
    kind, text = results[worker.FAILING]["errors"][name]
    assert (kind, message in text) == (error, True), text
    kind, other = results[0]["errors"][name]
    assert kind == "ProcessError"
    assert f"lora_one.init failed on rank {worker.FAILING}: {error}: {text}" in other


@pytest.mark.parametrize("name", ["shares", "a batch less"])
def test_batches_that_differ_between_the_processes_are_an_error(results, name):
    texts = [of_process["errors"][name][1] for of_process in results]
    for text in texts:
        assert re.search(r"batch [12] must be the same in all 2 processes.*make_array_from_process_local_data", text)


def test_a_loss_that_is_not_finite_is_named_in_both(results):
    for of_process in results:
        text = of_process["errors"]["nan in all"][1]
        assert "batch 1: the loss must be finite, got nan" in text


def test_a_process_alone_does_not_wait_for_ever(results):
    kind, text = results[0]["errors"]["one process alone"]
    assert kind == "ProcessError" and "rank 1 did not come" in text
    kind, text = results[1]["errors"]["the other comes too late"]
    assert kind == "ProcessError" and "failed on rank 0: ProcessError" in text
    assert [of_process["errors"]["after that"] for of_process in results] == [("", ""), ("", "")]


def test_a_folder_that_one_process_cannot_open_or_write_is_an_error_in_both(results):
    kinds = [{of_process["fsdp"][name][0] for of_process in results} for name in ("missing", "unwritable")]
    assert kinds == [{"CheckpointError", "ProcessError"}] * 2
