"""Is a start that the optimizer makes of the first steps as good as one from batches?

    python -m benchmarks.deferred                                # an hour on one core
    python -m benchmarks.deferred --tasks sort --batches 4 16    # a part; runs that are there are not made again
    python -m benchmarks.deferred --what directions              # what each step holds of the true gradient
    python -m benchmarks.deferred --table                        # the tables of the result that is there

Every contender of a seed trains on the same batches, for as many steps, at the same rate: LoRA-One's best of the main
table, times sqrt(batch / 16) for other batches. The deferred starts use the first of these steps up; the start from
batches reads 128 other items before. Differences are in points, paired by seed, with 95 % intervals.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import stats

import lora_one
from benchmarks import harness
from benchmarks.energy import exact_gradients, factors_of, shares_of_best
from benchmarks.quality.contenders import Contender, lora_one_start, ours, without_data
from benchmarks.quality.plan import RANK
from benchmarks.quality.run import run
from benchmarks.quality.task import Task
from benchmarks.quality.tasks import TASKS

RESULT = harness.RESULTS / "deferred.json"
RATES = {"sort": 5e-3, "desc": 5e-3, "t5": 2e-3, "minilm": 2e-3, "sort-long": 5e-3}
ITEMS = 128  # that the start from batches reads
EXPLICIT = "from batches"
DEFERRED: dict[str, int | str] = {"auto": "auto", "6 steps": 6, "16 steps": 16}
TRUE_GRADIENT_ITEMS = 1024


def contenders(batch: int) -> dict[str, Contender]:
    starts = {EXPLICIT: Contender(lora_one_start(max(1, ITEMS // batch)), optimizer=ours(start_steps=0))}
    return starts | {name: Contender(without_data, optimizer=ours(start_steps=n)) for name, n in DEFERRED.items()}


def with_batch(task: Task, batch: int) -> Task:
    return dataclasses.replace(task, batch_size=batch)


def quality(tasks: list[str], batches: list[int], seeds: int, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The runs that `rows` lacks, one row each."""
    done = {(row["task"], row["batch"], row["contender"], row["seed"]) for row in rows}
    for batch in batches:
        for name in tasks:
            task = with_batch(TASKS[name](), batch)
            rate = RATES[name] * (batch / 16) ** 0.5
            for seed in range(seeds):
                for contender, how in contenders(batch).items():
                    if (name, batch, contender, seed) not in done:
                        measured = run(task, how, RANK, rate, seed)
                        kept = {key: measured[key] for key in ("score", "test_loss", "seconds_init", "seconds_train")}
                        yield {"task": name, "batch": batch, "contender": contender, "seed": seed, "rate": rate, **kept}


def directions(tasks: list[str], batches: list[int], seeds: int) -> Iterator[dict[str, Any]]:
    """By step: the share of the energy of the best rank-r part of the true gradient that the factors hold.

    The true gradient is the mean over `TRUE_GRADIENT_ITEMS` items at the base model. Worst and median layer, and the
    agreement that the optimizer saw.
    """
    for name in tasks:
        task = TASKS[name]()
        items = [task.collate(task.train[i : i + 64]) for i in range(0, min(TRUE_GRADIENT_ITEMS, len(task.train)), 64)]
        gradients = exact_gradients(task.model(), items, task.loss_fn, task.targets)
        for batch in batches:
            for seed in range(seeds):
                torch.manual_seed(seed)
                model, _ = without_data(with_batch(task, batch), RANK, seed)
                report = lora_one.backends.waiting.report_of(model)
                adamw = lora_one.optimizer(model, start_steps=DEFERRED["16 steps"])
                model.train()
                for step, items_of_step in enumerate(with_batch(task, batch).training_batches(seed), 1):
                    adamw.zero_grad()
                    task.loss_fn(model, items_of_step).backward()
                    adamw.step()
                    shares = list(shares_of_best(gradients, {n: factors_of(model, n) for n in gradients}).values())
                    agreement = float(np.mean([layer.agreement for layer in report.layers]))
                    yield {
                        "task": name,
                        "batch": batch,
                        "seed": seed,
                        "step": step,
                        "worst": round(min(shares), 4),
                        "median": round(float(np.median(shares)), 4),
                        "agreement": round(agreement, 3),
                    }
                    if report.done:
                        break


def difference(
    rows: list[dict[str, Any]], task: str, batch: int, contender: str, key: str = "score", unit: float = 100.0
) -> str:
    """Mean of the contender's numbers less those of the start from batches, paired by seed, with its interval."""
    found: dict[str, dict[int, float]] = {
        name: {row["seed"]: row[key] for row in _of(rows, task, batch) if row["contender"] == name}
        for name in (contender, EXPLICIT)
    }
    seeds = sorted(found[contender].keys() & found[EXPLICIT].keys())
    differences = unit * np.array([found[contender][seed] - found[EXPLICIT][seed] for seed in seeds])
    if len(seeds) < 2:
        return ""
    half = stats.t.ppf(0.975, len(seeds) - 1) * differences.std(ddof=1) / len(seeds) ** 0.5
    digits = 1 if unit > 1 else 3
    return f"{differences.mean():+.{digits}f} ± {half:.{digits}f} ({len(seeds)})"


def _of(rows: list[dict[str, Any]], task: str, batch: int) -> list[dict[str, Any]]:
    return [row for row in rows if (row["task"], row["batch"]) == (task, batch)]


def compared(result: dict[str, list[dict[str, Any]]], key: str) -> str:
    """The start from batches, and what each deferred start has more; key: "score", in %, or "test_loss"."""
    rows = result.get("quality", [])
    unit = 100.0 if key == "score" else 1.0
    title = f"{EXPLICIT}, {'%' if key == 'score' else 'loss'}"
    lines = [
        [
            task,
            batch,
            _mean(rows, task, batch, key, unit),
            *(difference(rows, task, batch, name, key, unit) for name in DEFERRED),
        ]
        for batch, task in sorted({(row["batch"], row["task"]) for row in rows})
    ]
    return harness.table(["task", "batch", title, *DEFERRED], lines)


def held_by_step(result: dict[str, list[dict[str, Any]]]) -> str:
    """What the factors hold of the true gradient after each step."""
    held = result["directions"]
    steps = (1, 2, 3, 4, 6, 8, 12, 16)
    kinds = sorted({(row["task"], row["batch"]) for row in held})
    return harness.table(
        ["task", "batch", *(f"step {step}" for step in steps)],
        [[task, batch, *(_held(held, task, batch, step) for step in steps)] for task, batch in kinds],
    )


def tables(result: dict[str, list[dict[str, Any]]]) -> str:
    """All that there are."""
    parts = [compared(result, "score"), compared(result, "test_loss")]
    return "\n\n".join([*parts, held_by_step(result)] if result.get("directions") else parts)


def _mean(rows: list[dict[str, Any]], task: str, batch: int, key: str, unit: float) -> str:
    found = [row[key] for row in _of(rows, task, batch) if row["contender"] == EXPLICIT]
    return f"{unit * np.mean(found):.{1 if unit > 1 else 3}f}" if found else ""


def _held(rows: list[dict[str, Any]], task: str, batch: int, step: int) -> str:
    found = [row for row in rows if (row["task"], row["batch"], row["step"]) == (task, batch, step)]
    if not found:
        return ""
    worst, median, agreement = (np.mean([row[key] for row in found]) for key in ("worst", "median", "agreement"))
    return f"{worst:.2f}/{median:.2f} ({agreement:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 4, 1, 64])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--what", choices=("quality", "directions"), default="quality")
    parser.add_argument("--table", action="store_true", help="print the tables of the result, and measure nothing")
    parser.add_argument("--out", type=lambda text: harness.Path(text), default=RESULT)
    options = parser.parse_args()
    result = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    if not options.table:
        rows = result.setdefault(options.what, [])
        if options.what == "directions":
            rows[:] = [row for row in rows if row["task"] not in options.tasks]
            made = directions(options.tasks, options.batches, options.seeds)
        else:
            made = quality(options.tasks, options.batches, options.seeds, rows)
        for row in made:
            rows.append(row)
            result |= {"machine": harness.machine(), "versions": harness.versions("torch", "peft", "transformers")}
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            if options.what == "quality":
                print(json.dumps(row), flush=True)
    print(tables(result))


if __name__ == "__main__":
    main()
