"""The callback and the optimizer of the Trainer in two processes get what they get in one."""

import copy
import os
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import distributed as dist
from transformers import LlamaForCausalLM

import lora_one
from lora_one.errors import ModelError
from lora_one.integrations.transformers import LoraOneCallback, optimizer
from tests.backends.torch.models import llama
from tests.backends.torch.spawning import free_port, in_processes

from .trainers import (
    BATCH,
    EXACT,
    SAMPLES,
    STEPS,
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
ZERO = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}
ZERO |= dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
ONE, FIRST_STEPS = "one process", "first steps"
IN_PARTS = "ZeRO-3"  # whose weights transformers loads in parts
ENGINES: dict[str, dict[str, Any]] = {ONE: {}, "DDP": {"ddp_backend": "gloo"}, "FSDP2": FSDP2}
ENGINES |= {
    f"ZeRO-{stage}": {"ddp_backend": "gloo", "deepspeed": {**ZERO, "zero_optimization": {"stage": stage}}}
    for stage in (1, 2, 3)
}
KINDS = {"DDP": "DistributedDataParallel", "FSDP2": "FSDPPeftModelForCausalLM"}
OPTIMIZERS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "preconditioned LoRA+": {"precondition": True, "reg": 1e-2, "loraplus_lr_ratio": 4.0},
    FIRST_STEPS: {"start_steps": 4},  # one more than there are before the checkpoint
}
CASES = [(engine, name) for engine in KINDS for name in OPTIMIZERS] + [(f"ZeRO-{i}", "AdamW") for i in (1, 2, 3)]


class Forced(Recording):
    """A Trainer whose accelerate uses FSDP2 on CPUs too, where it would use DDP."""

    def create_accelerator_and_postprocess(self):
        if self.args.fsdp:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def llama_folder(out: str) -> str:
    if dist.get_rank() == 0:
        llama().model.save_pretrained(f"{out}-base")
    dist.barrier()
    return f"{out}-base"


def train(out: str, processes: int, engine: str, name: str, resume: str | None = None) -> tuple[Forced, Recorder, Any]:
    """Train on batches that are the same whatever the number of processes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    of_process = {"per_device_train_batch_size": BATCH // processes, "gradient_accumulation_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    args = arguments(out, **of_process, **saving, **copy.deepcopy(ENGINES[engine]))
    options = OPTIMIZERS[name]
    factory = {} if options is None else {"optimizer_cls_and_kwargs": optimizer(args, **options)}
    base = None
    if engine == IN_PARTS:
        base = LlamaForCausalLM.from_pretrained(llama_folder(out), dtype=torch.float32)
        assert all(x.numel() == 0 for x in base.parameters())
    trainer = Forced(adapted(base), args, train_dataset=rows(), **factory)
    callback, recorder = LoraOneCallback(trainer, EXACT, SAMPLES), Recorder()
    for each in [callback] * (name != FIRST_STEPS) + [recorder]:
        trainer.add_callback(each)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder, callback.report


def run(processes: int, engine: str, name: str) -> dict[str, Any]:
    """Train, save, and resume from the middle."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        if processes > 1:
            dist.broadcast_object_list(folder)
        trainer, recorder, report = train(f"{folder[0]}/whole", processes, engine, name)
        result = {
            "kind": type(trainer.model_wrapped).__name__,
            "start": products(recorder.factors),
            "report": report,
            "losses": losses(trainer),
            "end": products(factors(trainer.model)),
        }
        lora_one.save(trainer.model, f"{folder[0]}/saved", report)
        result["saved"] = products(factors(lora_one.load(llama().model, f"{folder[0]}/saved")))
        resumed, _, again = train(
            f"{folder[0]}/resumed", processes, engine, name, f"{folder[0]}/whole/checkpoint-{STEPS // 2}"
        )
        result |= {"resumed": products(factors(resumed.model)), "losses of resumed": losses(resumed)}
        assert again is None
        if processes > 1:
            dist.barrier()
    return result


def run_all(rank: int) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    outcomes: dict[Any, Any] = {case: run(PROCESSES, *case) for case in CASES if case[0] in KINDS}
    deepspeed = pytest.importorskip("deepspeed")
    deepspeed.init_distributed("gloo")
    outcomes |= {case: run(PROCESSES, *case) for case in CASES if case not in outcomes}
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(folder, PROCESSES, "ZeRO-2", FIRST_STEPS)
        except ModelError as error:
            outcomes["error"] = str(error)
    return outcomes


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return in_processes(run_all, PROCESSES)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: run(1, ONE, name) for name in OPTIMIZERS}


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_two_processes_start_and_train_as_one(results, alone, engine, name):
    expected = alone[name]
    for of_rank in results:
        got = of_rank[engine, name]
        assert got["kind"] == KINDS.get(engine, "DeepSpeedEngine")
        if name != FIRST_STEPS:
            assert got["report"].batches == PROCESSES * expected["report"].batches == SAMPLES // (BATCH // PROCESSES)
            assert got["report"].base_loss == pytest.approx(expected["report"].base_loss, rel=1e-6)
        assert_equal(got["start"], expected["start"], 1e-5)
        np.testing.assert_allclose(got["losses"], expected["losses"], rtol=1e-5)
        assert_equal(got["end"], expected["end"], 1e-3)
        assert_equal(got["end"], results[0][engine, name]["end"], 0.0)
        assert_equal(got["saved"], got["end"], 0.0)


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(results, engine, name):
    for of_rank in results:
        got = of_rank[engine, name]
        assert got["losses of resumed"] == got["losses"]
        assert_equal(got["resumed"], got["end"], 0.0)


def test_zero_flattens_the_factors_that_a_start_of_the_first_steps_needs(results):
    for of_rank in results:
        assert "start_steps=0 only" in of_rank["error"]
