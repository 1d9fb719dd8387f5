"""The peak memory against that of PyTorch's allocator on a GPU: benchmarks/results/init_h100.json."""

import json

import pytest

from benchmarks.harness import RESULTS
from benchmarks.init_models import GPU_CASES, llama_config
from lora_one.config import Config
from lora_one.estimate import Workload, estimate, read_architecture
from lora_one.estimate.hardware import known

MEASURED = json.loads((RESULTS / "init_h100.json").read_text(encoding="utf-8"))["cases"]
JOBS = {  # contender -> job, rank, the workload's settings that are not the default, and how near the page says
    "LoRA step, r = 8": ("training step", 8, {}, 0.012),
    "LoRA step, r = 24": ("training step", 24, {}, 0.012),
    "one pass": ("init, sketch", 8, {}, 0.03),
    "exact": ("init, exact", 8, {}, 0.03),
    "exact, recompute": ("init, exact", 8, {"checkpointing": True}, 0.115),
}
CASES = [(case, name) for case in ("1B", "8B") for name in MEASURED[case] if name in JOBS]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_peaks_on_an_h100_are_those_estimated(case, name, tmp_path):
    spec, numbers = GPU_CASES[case], MEASURED[case][name]
    llama_config(spec).save_pretrained(tmp_path)
    job, rank, settings, near = JOBS[name]
    config = Config(rank=rank)
    work = Workload(batch_size=spec.batch_size, seq_len=spec.length, init_batches=1, config=config, **settings)
    column = estimate(read_architecture(tmp_path), work, known("H100", "bfloat16")).columns[job]
    over_weights = column.total_memory - column.memory["base weights"]
    assert numbers["peak_mib"] * 2**20 == pytest.approx(over_weights, rel=near)
