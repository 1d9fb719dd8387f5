"""The callback and the optimizer of the Trainer in two processes get what they get in one."""

import os
import tempfile
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from lora_one.integrations.transformers import LoraOneCallback, optimizer
from tests.backends.torch.spawning import free_port, in_processes

from .trainers import (
    BATCH,
    EXACT,
    SAMPLES,
    Recorder,
    Recording,
    adapted,
    arguments,
    assert_equal,
    factors,
    losses,
    products,
    rows,
)

PROCESSES = 2
FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
ENGINES = {"DDP": {"ddp_backend": "gloo"}, "FSDP2": FSDP2}
OPTIMIZERS: dict[str, dict[str, Any] | None] = {"AdamW": None, "LoRA+": {"loraplus_lr_ratio": 4.0}}


class Forced(Recording):
    """A Trainer whose accelerate uses FSDP2 on CPUs too, where it would use DDP."""

    def create_accelerator_and_postprocess(self):
        if self.args.fsdp:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def run(processes: int, engine: dict[str, Any], options: dict[str, Any] | None, **settings: Any) -> dict[str, Any]:
    """Train on batches that are the same whatever the number of processes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with tempfile.TemporaryDirectory() as out:
        usual = {"per_device_train_batch_size": BATCH // processes, "gradient_accumulation_steps": 2}
        args = arguments(out, **{**usual, **engine, **settings})
        factory = {} if options is None else {"optimizer_cls_and_kwargs": optimizer(args, **options)}
        trainer = Forced(adapted(), args, train_dataset=rows(), **factory)
        trainer.add_callback(callback := LoraOneCallback(trainer, EXACT, SAMPLES))
        trainer.add_callback(recorder := Recorder())
        trainer.train()
    return {
        "start": products(recorder.factors),
        "base loss": callback.report.base_loss,
        "batches": callback.report.batches,
        "losses": losses(trainer),
        "end": products(factors(trainer.model)),
        "kind": type(trainer.model_wrapped).__name__,
    }


def run_all(rank: int) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {
        engine: {name: run(PROCESSES, settings, options) for name, options in OPTIMIZERS.items()}
        for engine, settings in ENGINES.items()
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return in_processes(run_all, PROCESSES)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: run(1, {}, options) for name, options in OPTIMIZERS.items()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_start_and_train_as_one(results, alone, engine, name):
    expected = alone[name]
    for of_rank in results:
        got = of_rank[engine][name]
        assert got["kind"] == {"DDP": "DistributedDataParallel", "FSDP2": "FSDPPeftModelForCausalLM"}[engine]
        assert got["batches"] == PROCESSES * expected["batches"] == SAMPLES // (BATCH // PROCESSES)
        assert_equal(got["start"], expected["start"], 1e-5)
        assert got["base loss"] == pytest.approx(expected["base loss"], rel=1e-6)
        np.testing.assert_allclose(got["losses"], expected["losses"], rtol=1e-5)
        assert_equal(got["end"], expected["end"], 1e-3)
        assert_equal(got["end"], results[0][engine][name]["end"], 0.0)
