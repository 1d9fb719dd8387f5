"""The peak memory against that of PyTorch's allocator on a GPU: benchmarks/results/init_h100.json.

When that was measured, an init still used PyTorch's own loss, as a training step does, and its sketch was another one.
"""

import json

import pytest

from benchmarks.harness import RESULTS
from benchmarks.init_models import GPU_CASES, llama_config
from lora_one.config import Config
from lora_one.estimate import Workload, activations, estimate, read_architecture
from lora_one.estimate.hardware import known

MEASURED = json.loads((RESULTS / "init_h100.json").read_text(encoding="utf-8"))["cases"]
JOBS = {  # contender -> job, rank, and the workload's settings that are not the default
    "LoRA step, r = 8": ("training step", 8, {}),
    "LoRA step, r = 24": ("training step", 24, {}),
    "exact": ("init, exact", 8, {}),
    "exact, recompute": ("init, exact", 8, {"checkpointing": True}),
}
CASES = [(case, name) for case in ("1B", "8B") for name in MEASURED[case] if name in JOBS]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_peaks_on_an_h100_are_those_estimated(case, name, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "loss_by_rows_bytes", activations.loss_bytes)
    spec, numbers = GPU_CASES[case], MEASURED[case][name]
    llama_config(spec).save_pretrained(tmp_path)
    job, rank, settings = JOBS[name]
    config = Config(rank=rank)
    work = Workload(batch_size=spec.batch_size, seq_len=spec.length, init_batches=1, config=config, **settings)
    column = estimate(read_architecture(tmp_path), work, known("H100", "bfloat16")).columns[job]
    over_weights = column.total_memory - column.memory["base weights"]
    assert numbers["peak_mib"] * 2**20 == pytest.approx(over_weights, rel=0.02)
