"""Tables of how far `lora-one estimate` is off: measured over estimated."""

from typing import Any, NamedTuple

from benchmarks.cost import COMPARED, summary
from benchmarks.init_models import GPU_CASES, llama_config
from benchmarks.page.markdown import table
from lora_one.config import Config
from lora_one.estimate import Workload, estimate
from lora_one.estimate.architecture import Architecture
from lora_one.estimate.hardware import PEAKS, known
from lora_one.estimate.reader import architecture_of
from lora_one.estimate.table import as_text

from .results import read

# contender of benchmarks.init -> job, rank, settings of the workload that are not the default
JOBS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "LoRA step, r = 8": ("training step", 8, {}),
    "LoRA step, r = 24": ("training step", 24, {}),
    "one pass": ("init, sketch", 8, {}),
    "exact": ("init, exact", 8, {}),
    "exact, recompute": ("init, exact", 8, {"checkpointing": True}),
}


class Pair(NamedTuple):
    """What was measured, and what the estimate says."""

    measured: float
    estimated: float

    def shown(self, digits: int) -> str:
        """Both, and their ratio."""
        ratio = self.measured / self.estimated
        return f"{self.measured:.{digits}f} / {self.estimated:.{digits}f} = {ratio:.2f}"


def example() -> str:
    """What the command prints for a Llama of 8B on an H100."""
    work = Workload(batch_size=4, seq_len=1024, config=Config(rank=8))
    lines = as_text(estimate(_llama("8B"), work, known("H100", "bfloat16"))).splitlines()
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


def _llama(case: str) -> Architecture:
    return architecture_of(llama_config(GPU_CASES[case]).to_dict(), f"llama {case}")


def rates() -> str:
    """The peaks of known accelerators."""
    lines = [[name, *(f"{rate:g}" for rate in peaks)] for name, peaks in PEAKS.items()]
    return table(["", "TFLOP/s, bfloat16", "TFLOP/s, float32", "GB/s", "GB"], lines).strip()


def on_cpu() -> str:
    """The table of benchmarks.cost."""
    rows = read("cost")["rows"]
    lines = []
    for row in rows:
        pairs = [Pair(row[measured], row[estimated]) for measured, estimated, _ in COMPARED.values()]
        shown = [pair.shown(digits) for pair, digits in zip(pairs, (0, 2), strict=True)]
        lines.append([row["model"], row["job"], *shown, f"{row['resident_mib']:.0f}"])
    spreads = [", ".join(f"{value:.2f}" for value in spread.values()) for spread in summary(rows).values()]
    lines.append(["all", "least, median, most", *spreads, ""])
    return table(["model", "job", "memory of tensors, MiB", "time, s", "resident, MiB"], lines).strip()


def gpu_cases() -> list[tuple[str, str]]:
    """Return (model, contender) of what was measured on an H100."""
    cases = read("init_h100")["cases"]
    return [(case, name) for case in cases for name in JOBS if name in cases[case]]


def on_gpu() -> str:
    """The same on an H100, whose time is estimated by 0.4 of its peak."""
    lines = []
    for case, name in gpu_cases():
        memory, seconds = gpu_pairs(case, name)
        lines.append([case, name, memory.shown(0), seconds.shown(2)])
    return table(["model", "", "memory of tensors, MiB", "time, s"], lines).strip()


def gpu_pairs(case: str, name: str) -> tuple[Pair, Pair]:
    """Peak memory over the model in MiB, and seconds, of a job on an H100."""
    spec, numbers = GPU_CASES[case], read("init_h100")["cases"][case][name]
    job, rank, settings = JOBS[name]
    work = Workload(
        batch_size=spec.batch_size, seq_len=spec.length, init_batches=1, config=Config(rank=rank), **settings
    )
    column = estimate(_llama(case), work, known("H100", "bfloat16")).columns[job]
    over_weights = column.total_memory - column.memory["base weights"]
    return Pair(numbers["peak_mib"], over_weights / 2**20), Pair(numbers["seconds"], column.total_seconds)


def spread_on_gpu() -> str:
    """The ratios of the table on an H100 in words."""
    ratios: dict[str, list[float]] = {}
    for case, name in gpu_cases():
        memory, seconds = gpu_pairs(case, name)
        job = "training steps" if name.startswith("LoRA step") else "starts"
        ratios.setdefault(f"memory of {job}", []).append(memory.measured / memory.estimated)
        ratios.setdefault(f"time of {job}", []).append(seconds.measured / seconds.estimated)
    return "\n".join(f"- {what}: {min(x):.2f} to {max(x):.2f} times the estimate" for what, x in ratios.items())
