"""How far off is `lora-one estimate`? Measured peak memory and time of a step and of both inits, over estimated.

    export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
    python -m benchmarks.cost [--only "100M float32" [--job "init, exact"] | --recount]

writes results/cost.json and docs/images/cost.png. docs/evidence/estimate.md has the numbers. With --only, it
replaces the rows of that model. With --recount, it measures nothing: it compares the rows in the file with today's
estimates, at the rates that were measured with them.

The models are random Llamas. Each job runs in two separate processes. In the first, every tensor has its own memory
mapping. So the peak of the resident memory, over that with the model loaded, is the bytes of tensors, as an
accelerator's allocator would count them. The second runs as a user's, with the holes of glibc's heap. It gives the
time: the processor's time on one thread, which is wall time on an idle core. Each process runs a tiny model first, so
that code and buffers of libraries are not counted. Rerun it after a change to the PyTorch init or step.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_one.config import Config
from lora_one.estimate import Column, Workload, estimate
from lora_one.estimate.hardware import Hardware
from lora_one.estimate.rates import measured
from lora_one.estimate.reader import architecture_of

RESULT = Path(__file__).parent / "results" / "cost.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "cost.png"
MIB = 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h
JOBS = ("training step", "init, sketch", "init, exact")


def _llama(hidden: int, intermediate: int, layers: int, vocabulary: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
    }


SIZES = {"25M": _llama(384, 1024, 8, 16000, 6), "100M": _llama(768, 2048, 10, 16000, 12),
         "350M": _llama(1024, 2816, 22, 32000, 16)}  # fmt: skip
SEQUENCES = {"25M": 2, "100M": 1, "350M": 1}  # of 256 tokens
DTYPES = ("float32", "bfloat16")
TINY = _llama(64, 128, 2, 256, 4)


class Measured(NamedTuple):
    """A job in its process: the peak in bytes over the loaded model, and seconds."""

    memory: int
    seconds: float


def measure(job: str, config: dict[str, Any], work: Workload, own_mappings: bool = False) -> Measured:
    """Measure a job in this process.

    Args:
        own_mappings: give each tensor its own memory mapping, which is freed with the tensor.
    """
    if own_mappings:
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    _prepared(job, TINY, dataclasses.replace(work, batch_size=1, seq_len=64))()
    run = _prepared(job, config, work)
    if job == "training step":
        run()  # Adam's moments exist from the first step on, and kernels are chosen in it
    gc.collect()
    loaded = _loaded()
    seconds = []
    for _ in range(3 if job == "training step" else 1):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return Measured(_status("VmHWM") - loaded, statistics.median(seconds))


def _prepared(job: str, config: dict[str, Any], work: Workload) -> Callable[[], object]:
    """Return a function that runs the job on a new random model."""
    import numpy as np
    import torch
    import transformers

    import lora_one

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=getattr(torch, work.dtype), attn_implementation="sdpa"
    )
    tokens = np.random.default_rng(0).integers(3, config["vocab_size"], (work.batch_size, work.seq_len))
    ids = torch.tensor(tokens)
    batches = [{"input_ids": ids, "labels": ids}] * work.init_batches
    if job == "training step":
        return _step(model, batches[0], work.config)
    gradient: Any = "exact" if "exact" in job else "sketch"
    return lambda: lora_one.init(model, batches, config=dataclasses.replace(work.config, gradient=gradient))


def _step(model: Any, batch: dict[str, Any], config: Config) -> Callable[[], object]:
    import peft

    import lora_one

    model = peft.get_peft_model(model, peft.LoraConfig(r=config.rank, target_modules="all-linear"))
    optimizer = lora_one.optimizer(model)

    def run() -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _status(field: str) -> int:
    """Return a line of Linux's /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _loaded() -> int:
    """Return the bytes that are resident now, without what is free, and count the peak from here."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _status("VmRSS")


def in_own_process(*arguments: Any) -> Measured:
    """Return the result of `measure` in a fresh interpreter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def measured_rows(
    name: str, config: dict[str, Any], work: Workload, run: Callable[..., Measured], jobs: Sequence[str] = JOBS
) -> list[dict[str, Any]]:
    """Measure each of the jobs."""
    rows = []
    for job in jobs:
        live, usual = (run(job, config, work, own_mappings) for own_mappings in (True, False))
        rows.append(
            {
                "model": name,
                "job": job,
                "live_mib": live.memory / MIB,
                "resident_mib": usual.memory / MIB,
                "seconds": usual.seconds,
                "seconds_own_mappings": live.seconds,
            }
        )
    return rows


def compared(row: dict[str, Any], config: dict[str, Any], work: Workload, machine: Hardware) -> dict[str, Any]:
    """Return a measured row with the estimate and their ratios added, and print it."""
    model = architecture_of(config, row["model"])
    column = estimate(model, work, machine).columns[row["job"]]
    estimated = {
        "estimated_live_mib": _above_the_model(row["job"], column) / MIB,
        "estimated_seconds": column.total_seconds,
        "estimated_parts": {"memory": column.memory, "seconds": column.seconds},
    }
    row = {**row, "parameters": model.parameters, **estimated}
    for measured_key, estimated_key, ratio in COMPARED.values():
        row[ratio] = row[measured_key] / row[estimated_key]
    shown = [f"{what} {row[a]:.2f} / {row[b]:.2f} = {row[ratio]:.2f}" for what, (a, b, ratio) in COMPARED.items()]
    print(f"{row['model']:14} {row['job']:14}", *(f"{text:45}" for text in shown), flush=True)
    return row


# name -> the row's keys of the measured value, the estimate, and their ratio.
COMPARED = {
    "memory of tensors": ("live_mib", "estimated_live_mib", "live_ratio"),
    "time": ("seconds", "estimated_seconds", "time_ratio"),
}


def _above_the_model(job: str, column: Column) -> int:
    """Return the estimated bytes of tensors that do not exist before the job."""
    before = ("base weights", *(("LoRA factors", "Adam moments") if job == "training step" else ()))
    return column.total_memory - sum(column.memory.get(part, 0) for part in before)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return measured over estimated: the least, the median and the most."""
    spreads = {}
    for what, (_, _, ratio) in COMPARED.items():
        ratios = [row[ratio] for row in rows]
        spreads[what] = {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)}
    return spreads


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the measured values against the estimates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (what, (measured_key, estimated_key, _)) in zip(figure.subplots(1, 2), COMPARED.items(), strict=True):
        for job, marker in zip(JOBS, "osD", strict=True):
            for dtype, fill in zip(DTYPES, ("full", "none"), strict=True):
                mine = [row for row in rows if row["job"] == job and row["model"].endswith(dtype)]
                points = [row[estimated_key] for row in mine], [row[measured_key] for row in mine]
                axes.loglog(*points, marker, fillstyle=fill, label=f"{job}, {dtype}")
        ends = [f(row[key] for row in rows for key in (measured_key, estimated_key)) for f in (min, max)]
        axes.loglog(ends, ends, "k-", lw=0.8)
        unit = "s" if what == "time" else "MiB"
        axes.set(xlabel=f"estimated, {unit}", ylabel=f"measured, {unit}", title=what)
        axes.tick_params(which="minor", labelsize="x-small")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    names = [f"{size} {dtype}" for size in SIZES for dtype in DTYPES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=names, help="one model; the other rows stay as they are")
    parser.add_argument("--job", choices=JOBS, help="one of the jobs; the other rows stay, at the rates measured now")
    parser.add_argument("--recount", action="store_true", help="estimate anew beside what was measured")
    parser.add_argument("--smoke", type=Path, metavar="FILE", help="a tiny model, in this process; writes FILE only")
    options = parser.parse_args(arguments)
    if options.smoke:
        work = Workload(seq_len=16, init_batches=2, dtype="float32", config=Config(rank=8))
        machine = measured("float32", time.process_time)
        rows = [compared(row, TINY, work, machine) for row in measured_rows("tiny float32", TINY, work, measure)]
        write(rows, {"tiny float32": machine}, options.smoke)
        return
    if options.recount:
        write(*_merged([], {}))
        return
    rows: list[dict[str, Any]] = []
    rates = {}
    for name in [options.only] if options.only else names:
        rates[name] = measured(name.split()[1], time.process_time)
        rows += measured_rows(name, *_case(name), in_own_process, [options.job] if options.job else JOBS)
        write(*_merged(rows, rates))


def _merged(
    fresh: list[dict[str, Any]], rates: dict[str, Hardware]
) -> tuple[list[dict[str, Any]], dict[str, Hardware]]:
    """Return the fresh rows and the other ones of the result file, all with today's estimates."""
    rows = list(fresh)
    if RESULT.is_file():
        taken = {(row["model"], row["job"]) for row in fresh}
        last = json.loads(RESULT.read_text(encoding="utf-8"))
        rates = {name: Hardware(**values) for name, values in last["rates"].items()} | rates
        rows += [row for row in last["rows"] if (row["model"], row["job"]) not in taken]
    rows.sort(key=lambda row: (list(SIZES).index(row["model"].split()[0]), row["model"], JOBS.index(row["job"])))
    return [compared(row, *_case(row["model"]), rates[row["model"]]) for row in rows], rates


def _case(name: str) -> tuple[dict[str, Any], Workload]:
    """Return the config and the workload of a model."""
    size, dtype = name.split()
    work = Workload(batch_size=SEQUENCES[size], seq_len=256, init_batches=2, dtype=dtype, config=Config(rank=8))
    return SIZES[size], work


def write(rows: list[dict[str, Any]], rates: dict[str, Hardware], smoke: Path | None = None) -> None:
    """Write all result files, or the one file of a smoke run."""
    import torch

    result = {
        "what": "rank 8, 2 init batches, one pass, sdpa; memory is the peak over the loaded model",
        "device": f"one thread of a {platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rates": {name: dataclasses.asdict(machine) for name, machine in rates.items()},
        "measured_over_estimated": summary(rows),
        "rows": rows,
    }
    text = json.dumps(result, indent=1) + "\n"
    if smoke:
        smoke.write_text(text, encoding="utf-8")
        return
    RESULT.write_text(text, encoding="utf-8")
    draw(rows, PICTURE)


if __name__ == "__main__":
    main()
