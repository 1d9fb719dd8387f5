"""An error in one process of a parallel run is an error in all of them, at once, and it names the process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import lora_one
from lora_one.backends import processes
from lora_one.errors import ProcessError
from tests.backends.torch.models import mlp
from tests.backends.torch.spawning import in_processes
from tests.outcome import outcome

CONFIG = lora_one.Config(rank=2, gradient="exact")
FAILING = 1  # the rank


def start(rank: int, batches=None, loss_fn=None, config=CONFIG) -> lora_one.Report:
    case = mlp()
    batches = case.batches[rank::2] if batches is None else batches
    return lora_one.init(case.model, batches, loss_fn or case.loss_fn, config)[1]


def loss_that_is_nan(model, batch):
    return mlp().loss_fn(model, batch) * float("nan")


def loss_that_is_infinitely_steep(model, batch):
    x = model(batch[0])
    return (x - x.detach()).square().sum().sqrt()  # zero, with a gradient that is not a number


def loss_that_raises(model, batch):
    raise KeyError("no such column")


def batches_that_raise():
    yield mlp().batches[0]
    raise OSError("the disk is gone")


# Name -> what the failing process does instead of `start`, its own error, and what it says.
CASES: dict[str, tuple[Callable[[], object], str, str]] = {
    "a loss that is not finite": (
        lambda: start(FAILING, loss_fn=loss_that_is_nan), "GradientError", "batch 1: the loss must be finite"),
    "a gradient that is not finite": (
        lambda: start(FAILING, loss_fn=loss_that_is_infinitely_steep, config=lora_one.Config(rank=2)),
        "GradientError", "its gradient is not finite"),
    "no batches": (lambda: start(FAILING, batches=[]), "BatchError", "at least one batch, got none"),
    "an exception of the loss": (lambda: start(FAILING, loss_fn=loss_that_raises), "KeyError", "no such column"),
    "an exception of the batches": (
        lambda: start(FAILING, batches=batches_that_raise()), "OSError", "the disk is gone"),
    "an unsuitable model": (
        lambda: lora_one.init(torch.nn.Tanh(), [1], config=CONFIG), "ModelError", ""),
}  # fmt: skip


def run_all(rank: int) -> dict[str, Any]:
    outcomes: dict[str, Any] = {
        name: outcome(fails if rank == FAILING else lambda: start(rank)) for name, (fails, _, _) in CASES.items()
    }
    processes.ARRIVAL_SECONDS = processes.LEAVING_SECONDS = 0.5
    outcomes["one process alone"] = outcome(lambda: start(0) if rank == 0 else None)
    torch.distributed.barrier()
    outcomes["the other comes too late"] = outcome(lambda: start(1) if rank == 1 else None)
    processes.ARRIVAL_SECONDS = 60.0
    around = DistributedDataParallel(mlp().model)
    outcomes["around"] = outcome(lambda: lora_one.init(around, mlp().batches, mlp().loss_fn, CONFIG))
    outcomes["batches"] = start(rank).batches
    uneven = mlp().batches
    outcomes["uneven batches"] = start(rank, uneven[:1] if rank == 0 else uneven[1:]).batches
    return outcomes


@pytest.fixture(scope="module")
def outcomes():
    return in_processes(run_all)


@pytest.mark.parametrize("name", CASES)
def test_an_error_in_one_process_is_an_error_in_all(outcomes, name):
    _, error, message = CASES[name]
    kind, text = outcomes[FAILING][name]
    assert (kind, message in text) == (error, True), text
    kind, other = outcomes[0][name]
    assert kind == ProcessError.__name__
    assert f"lora_one.init failed on rank {FAILING}: {error}: {text}" in other


def test_a_process_alone_does_not_wait_for_ever(outcomes):
    kind, text = outcomes[0]["one process alone"]
    assert kind == ProcessError.__name__
    assert "lora_one.init must be called by every process" in text and "rank 1 did not come" in text
    kind, text = outcomes[1]["the other comes too late"]
    assert kind == ProcessError.__name__ and "failed on rank 0: ProcessError" in text


def test_a_model_without_lora_in_distributed_data_parallel_is_refused(outcomes):
    """It would be returned without the wrapper, and its LoRA trained in each process by itself."""
    for of_rank in outcomes:
        assert (
            "is in DistributedDataParallel without LoRA, whose gradients it would not average" in of_rank["around"][1]
        )


def test_after_errors_the_processes_start_models_again(outcomes):
    assert [of_rank["batches"] for of_rank in outcomes] == [3, 3]
    assert [of_rank["uneven batches"] for of_rank in outcomes] == [3, 3]
