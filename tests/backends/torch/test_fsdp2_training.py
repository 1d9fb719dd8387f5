"""FSDP2: the preconditioner, LoRA+ and a start from the first steps train sharded factors as whole ones."""

import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

import lora_one
from lora_one.backends.torch import attach_plain
from tests.backends.torch.models import llama
from tests.backends.torch.sharded import BATCHES, assert_equal, factors, products, shard, train, trained
from tests.backends.torch.spawning import in_processes

PROCESSES, STEPS = 2, 4
CONFIG = lora_one.Config(rank=3, gradient="exact")  # a rank that the processes cannot share equally
OPTIONS: dict[str, dict[str, Any]] = {
    "precondition": {"precondition": True},
    "LoRA+": {"precondition": True, "loraplus_lr_ratio": 4.0, "damping": "relative"},
    "deferred": {"start_steps": 2},
    "both": {"start_steps": 2, "precondition": True},
}


ORDERS = "started first", "sharded first", "base sharded first"


def started(name: str, order: str, rank: int, processes: int) -> nn.Module:
    """Return a model that is started, and sharded before or after that if there are several processes."""
    model = llama().model
    if processes > 1 and order == "sharded first":
        model = shard(attach_plain(model, CONFIG))
    if processes > 1 and order == "base sharded first":  # on a mesh of replicas, under names of its own
        model = shard(model, mesh=init_device_mesh("cpu", (1, processes), mesh_dim_names=("copies", "parts")))
    if "start_steps" in OPTIONS[name]:
        model, _ = lora_one.init(model, config=lora_one.Config(rank=3))
    else:
        model, _ = lora_one.init(model, BATCHES[rank::processes], config=CONFIG)
    return shard(model) if processes > 1 and order == "started first" else model


def run(rank: int, name: str, order: str) -> dict[str, Any]:
    model = started(name, order, rank, PROCESSES)
    losses = trained(model, rank, PROCESSES, STEPS, **OPTIONS[name])
    return {"losses": losses, "end": products(model)}


def resumed(rank: int, name: str) -> dict[str, Any]:
    """Stop after one step, which is in the middle of a start, and go on from torch.distributed.checkpoint's files."""
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    model = started(name, ORDERS[0], rank, PROCESSES)
    optimizer = lora_one.optimizer(model, learning_rate=1e-2, **OPTIONS[name])
    train(model, optimizer, range(1), rank, PROCESSES)
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
    expected = train(model, optimizer, range(1, STEPS), rank, PROCESSES)
    expected_end = factors(model)

    model = started(name, ORDERS[0], rank, PROCESSES)
    optimizer = lora_one.optimizer(model, learning_rate=1e-2, **OPTIONS[name])
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    checkpoint.load(saved, checkpoint_id=folder[0])
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    losses = train(model, optimizer, range(1, STEPS), rank, PROCESSES)
    return {"losses": losses, "expected": expected, "end": factors(model), "expected end": expected_end}


def run_all(rank: int) -> dict[str, Any]:
    runs = {(name, order): run(rank, name, order) for name in OPTIONS for order in ORDERS}
    return {"runs": runs, "resumed": {name: resumed(rank, name) for name in OPTIONS}}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return in_processes(run_all, PROCESSES)


@pytest.mark.feature("Sharded weights")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_trains_as_one_process(results, name, order):
    model = started(name, ORDERS[0], 0, 1)
    losses = trained(model, steps=STEPS, **OPTIONS[name])
    end = products(model)
    for of_rank in results:
        got = of_rank["runs"][name, order]
        np.testing.assert_allclose(got["losses"], losses, rtol=1e-5)
        assert_equal(got["end"], end, 1e-4)
        assert_equal(got["end"], results[0]["runs"][name, order]["end"], 0.0)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(results, name):
    for of_rank in results:
        got = of_rank["resumed"][name]
        assert got["losses"] == got["expected"]
        assert_equal(got["end"], got["expected end"], 0.0)
