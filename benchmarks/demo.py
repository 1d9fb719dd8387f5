"""The embedded model on its two tasks: full fine-tuning, LoRA and LoRA-One, each over a grid of learning rates.

    python -m benchmarks.demo                       # the whole plan, appended to benchmarks/results/demo.json
    python -m benchmarks.demo --only lora lora-one --rates 3e-3 --seeds 0 --tasks main
    python -m benchmarks.demo --table

A run is one process's work of `--steps` steps of batch 32 at rank 8, and its measure the exact match on 256 held-out
items. All methods share the data order, the schedule and the optimizer (AdamW, no weight decay) of a seed. Runs that
the results file has already are not repeated.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import lora_one
from lora_one import demo
from lora_one.backends.torch import attach_plain
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import encode, encode_prompt
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.tuners.torch.opening import open_tuner

RESULT = Path(__file__).parent / "results" / "demo.json"
TASKS = {
    "main": (demo.TRAIN, demo.TEST),
    "harder": (demo.TRAIN.parent / "harder" / "train.jsonl", demo.TRAIN.parent / "harder" / "test.jsonl"),
}
# name -> (start, settings of Config, settings of the optimizer)
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "full": ("none", {}, {}),
    "lora": ("plain", {}, {}),
    "lora-one": ("spectral", {}, {}),
    "lora-one, exact": ("spectral", {"gradient": "exact"}, {}),
    "lora-one, gamma auto": ("spectral", {"gamma": "auto"}, {}),
    "lora-one, gamma 16": ("spectral", {"gamma": 16.0}, {}),
    "lora-one, gamma 1024": ("spectral", {"gamma": 1024.0}, {}),
    "lora-one, reg 1e-6": ("spectral", {}, {"precondition": True, "reg": 1e-6}),
    "lora-one, relative 1e-2": ("spectral", {}, {"precondition": True, "reg": 1e-2, "damping": "relative"}),
    "lora-one, relative 1": ("spectral", {}, {"precondition": True, "reg": 1.0, "damping": "relative"}),
    "lora-one, relative 100": ("spectral", {}, {"precondition": True, "reg": 100.0, "damping": "relative"}),
}


def run(task: str, method: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One fine-tuning run."""
    start, config, options = METHODS[method]
    train, test = (read_examples(path) for path in TASKS[task])
    recipe = Recipe(
        steps=steps,
        learning_rate=rate,
        seed=seed,
        config=lora_one.Config(seed=seed, **config),
        out="runs/benchmark",
        **options,
    )
    torch.manual_seed(seed)
    tuner = open_tuner(demo.MODEL, "float32", None)
    sequences = [encode(tuner.tokenizer, example) for example in train]
    began = time.perf_counter()
    report = None
    if start == "plain":
        tuner.model = attach_plain(tuner.model, recipe.config)
    elif start == "spectral":
        batches = tuner.batches(sequences[seed * 256 : (seed + 1) * 256], recipe.batch_size)
        tuner.model, report = lora_one.init(tuner.model, batches, tuner.loss_fn, recipe.config)
    initialised = time.perf_counter()
    losses: list[float] = []
    tuner.train(sequences, recipe, lambda step, loss: losses.append(loss))
    trained = time.perf_counter()
    answers = tuner.generate([encode_prompt(tuner.tokenizer, example) for example in test], 10)
    right = sum(tuner.tokenizer.decode(a) == e.completion for a, e in zip(answers, test, strict=True))
    return {
        "task": task,
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "exact_match": right / len(test),
        "loss_first_20": statistics.mean(losses[:20]),
        "loss_last_20": statistics.mean(losses[-20:]),
        "gamma": None if report is None else report.gamma,
        "seconds_init": initialised - began,
        "seconds_train": trained - initialised,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Exact match by method and rate: mean over the seeds, and how many there were."""
    lines = []
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task]
        rates = sorted({row["rate"] for row in mine})
        cells: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
        for row in mine:
            cells[row["method"], row["rate"]].append(row)
        lines += [f"{task}: exact match after {mine[0]['steps'] if mine else 0} steps, % (seeds); first-20-step loss"]
        lines += ["  " + "method".ljust(26) + "".join(f"{rate:>22g}" for rate in rates)]
        for method in METHODS:
            texts = [_cell(cells[method, rate]) for rate in rates]
            if any(texts):
                lines.append("  " + method.ljust(26) + "".join(text.rjust(22) for text in texts))
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    scores = [100 * row["exact_match"] for row in rows]
    spread = f"±{statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return (
        f"{statistics.mean(scores):.1f}{spread} ({len(rows)}) {statistics.mean(r['loss_first_20'] for r in rows):.2f}"
    )


def main() -> None:
    """Run what is asked for and not there yet; print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-3, 2e-3, 3e-3, 5e-3])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="only print what there is")
    options = parser.parse_args()
    rows = json.loads(options.result.read_text()) if options.result.exists() else []
    done = {(row["task"], row["method"], row["rate"], row["seed"], row["steps"]) for row in rows}
    plan = [
        (task, method, rate, seed, options.steps)
        for seed in options.seeds
        for task in options.tasks
        for rate in options.rates
        for method in options.only
    ]
    for key in [] if options.table else plan:
        if key not in done:
            rows.append(run(*key))
            print(json.dumps(rows[-1]), flush=True)
            options.result.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
