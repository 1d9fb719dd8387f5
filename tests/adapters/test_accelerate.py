"""The script for accelerate's loop trains in two processes, under DDP and under FSDP2."""

import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_one import demo
from lora_one.checkpoint.metadata import read_report
from tests.backends.torch.spawning import free_port, in_processes

SCRIPT = Path(__file__).parents[2] / "adapters" / "accelerate" / "finetune.py"
DATA, OUT = "LORA_ONE_TEST_DATA", "LORA_ONE_TEST_OUT"  # for the processes
STEPS, PER_PROCESS = 10, 8


def arguments(data: str, out: str, batch_size: int = PER_PROCESS) -> list[str]:
    return [str(SCRIPT), "--data", data, "--steps", str(STEPS), "--out", out, "--batch-size", str(batch_size)]


def under_fsdp2(rank: int) -> str:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true"}
    os.environ |= {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    os.environ |= {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # on CPUs accelerate would use DDP
    Accelerator.end_training = lambda self: None  # it would end the process group of the test
    sys.argv = arguments(os.environ[DATA], os.environ[OUT])
    with redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return printed.getvalue()


def losses(printed: str) -> list[float]:
    return [float(x) for x in re.findall(r"^step \d+: loss (\S+)", printed, flags=re.MULTILINE)]


def check(printed: str, out: Path) -> None:
    assert f"adapter: {out}" in printed
    assert len(losses(printed)) == 10 and losses(printed)[-1] < 0.7 * losses(printed)[0]
    assert read_report(out).batches == 8  # four of each process
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    tokens = torch.arange(4, 40)[None]
    plain = base(tokens).logits
    assert (plain - PeftModel.from_pretrained(base, out)(tokens).logits).abs().max() > 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("\n".join(demo.TRAIN.read_text().splitlines()[:64]) + "\n")
    return str(file)


def test_it_trains_in_two_processes_and_saves_an_adapter_that_peft_opens(tmp_path, monkeypatch, data):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), *arguments(data, str(tmp_path / "ddp"))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check(done.stdout, tmp_path / "ddp")

    monkeypatch.setenv(DATA, data)
    monkeypatch.setenv(OUT, str(tmp_path / "fsdp2"))
    printed = in_processes(under_fsdp2)
    check(printed[0], tmp_path / "fsdp2")
    assert losses(printed[0]) == pytest.approx(losses(done.stdout), rel=1e-3)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ddp", "fsdp2")]
    assert adapters[0].keys() == adapters[1].keys()
