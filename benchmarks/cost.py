"""How far off is `lora-one estimate`? Measured peak memory and time of a step and of both inits, over estimated.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.cost

writes results/cost.json, docs/cost.png and what `estimate` says of its error.

Random Llamas, each job in a process of its own. Memory is the resident set's peak over what it was with the model
loaded, as Linux counts it; time is the processor's on one thread, which is wall time on an idle core. Rerun it after a
change to the PyTorch init or step: the estimate's error is read from here.
"""

import argparse
import ctypes
import dataclasses
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_one.config import Config
from lora_one.estimate import MEASURED, Workload, estimate
from lora_one.estimate.architecture import architecture
from lora_one.estimate.hardware import Hardware, measured

RESULT = Path(__file__).parent / "results" / "cost.json"
PICTURE = Path(__file__).parents[1] / "docs" / "cost.png"
MIB = 2**20
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


# (config.json, dtype, sequences of 256 tokens, jobs); 154 dense SVDs at 350M would take longer than all the rest.
RUNS: dict[str, tuple[dict[str, Any], str, int, tuple[str, ...]]] = {
    "25M float32": (_llama(384, 1024, 8, 16000, 6), "float32", 2, JOBS),
    "100M float32": (_llama(768, 2048, 10, 16000, 12), "float32", 1, JOBS),
    "350M float32": (_llama(1024, 2816, 22, 32000, 16), "float32", 1, JOBS[:2]),
    "100M bfloat16": (_llama(768, 2048, 10, 16000, 12), "bfloat16", 1, JOBS[:2]),
}
SMOKE = {"tiny float32": (_llama(64, 128, 2, 256, 4), "float32", 1, JOBS)}


def measure(job: str, config: dict[str, Any], work: Workload) -> tuple[int, float]:
    """Bytes over the loaded model, and seconds, of a job in this process."""
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
    run = _step(model, batches[0], work.config) if job == "training step" else None
    loaded = _loaded()
    began = time.process_time()
    if run is None:
        gradient = "exact" if "exact" in job else "sketch"
        lora_one.init(model, batches, config=dataclasses.replace(work.config, gradient=gradient))
        seconds = time.process_time() - began
    else:
        run()  # Adam's moments exist from the first step on, and kernels are chosen in it
        began = time.process_time()
        run()
        seconds = time.process_time() - began
    return _status("VmHWM") - loaded, seconds


def _step(model: Any, batch: dict[str, Any], config: Config) -> Any:
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
    """A line of Linux's /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _loaded() -> int:
    """Bytes resident now, after what building the model has freed is given back; the peak is counted from here."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _status("VmRSS")


def in_own_process(job: str, config: dict[str, Any], work: Workload) -> tuple[int, float]:
    """`measure` in a fresh interpreter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (job, config, work))


def compare(
    name: str,
    config: dict[str, Any],
    jobs: tuple[str, ...],
    work: Workload,
    machine: Hardware,
    run: Callable[..., tuple[int, float]],
) -> list[dict[str, Any]]:
    """Each job, measured and estimated."""
    found = estimate(architecture(config, name), work, machine)
    rows = []
    for job in jobs:
        column = found.columns[job]
        memory, seconds = run(job, config, work)
        # Of what is estimated, the base weights, and in a step the factors, are there before.
        before = sum(column.memory.get(x, 0) for x in ("base weights", *(("LoRA factors",) if job == JOBS[0] else ())))
        above = column.total_memory - before
        assert column.total_seconds is not None
        rows.append(
            {
                "model": name,
                "parameters": found.parameters,
                "job": job,
                "memory_mib": memory / MIB,
                "estimated_memory_mib": above / MIB,
                "memory_ratio": memory / above,
                "seconds": seconds,
                "estimated_seconds": column.total_seconds,
                "time_ratio": seconds / column.total_seconds,
                "estimated_parts": {"memory": column.memory, "seconds": column.seconds},
            }
        )
        row = rows[-1]
        print(
            f"{name:14} {job:14} memory {row['memory_mib']:7.0f} / {row['estimated_memory_mib']:7.0f} MiB "
            f"= {row['memory_ratio']:.2f}   time {seconds:6.2f} / {column.total_seconds:6.2f} s "
            f"= {row['time_ratio']:.2f}",
            flush=True,
        )
    return rows


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What `lora-one estimate` says of its error: measured over estimated."""
    spreads = {}
    for what in ("memory", "time"):
        ratios = [row[f"{what}_ratio"] for row in result["rows"]]
        values = {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)}
        spreads[what] = {key: round(value, 3) for key, value in values.items()}
    return {"device": result["device"], "runs": len(result["rows"]), **spreads}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured against estimated, memory and time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, what, unit in zip(figure.subplots(1, 2), ("memory_mib", "seconds"), ("MiB", "s"), strict=True):
        for job, marker in zip(JOBS, "osD", strict=True):
            mine = [row for row in rows if row["job"] == job]
            axes.loglog([r[f"estimated_{what}"] for r in mine], [r[what] for r in mine], marker, label=job)
        ends = [f(r[key] for r in rows for key in (what, f"estimated_{what}")) for f in (min, max)]
        axes.loglog(ends, ends, "k-", lw=0.8)
        axes.set(xlabel=f"estimated, {unit}", ylabel=f"measured, {unit}", title=what.split("_")[0])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", type=Path, metavar="FILE", help="a tiny model, in this process; writes FILE alone")
    options = parser.parse_args(arguments)
    machine = measured(clock=time.process_time)
    rows = []
    for name, (config, dtype, sequences, jobs) in (SMOKE if options.smoke else RUNS).items():
        length = 16 if options.smoke else 256
        work = Workload(batch_size=sequences, seq_len=length, init_batches=2, dtype=dtype, config=Config(rank=8))
        rows += compare(name, config, jobs, work, machine, measure if options.smoke else in_own_process)
        write(rows, machine, options.smoke)


def write(rows: list[dict[str, Any]], machine: Hardware, smoke: Path | None) -> None:
    """All result files, or of a smoke run its one."""
    import torch

    result = {
        "what": "rank 8, 2 init batches, 4 passes, sdpa; memory is the resident peak over the loaded model",
        "device": f"one thread of a {platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rates": dataclasses.asdict(machine),
        "rows": rows,
    }
    text = json.dumps(result, indent=1) + "\n"
    if smoke:
        smoke.write_text(text, encoding="utf-8")
        return
    RESULT.write_text(text, encoding="utf-8")
    MEASURED.write_text(json.dumps(summary(result), indent=1) + "\n", encoding="utf-8")
    draw(rows, PICTURE)


if __name__ == "__main__":
    main()
