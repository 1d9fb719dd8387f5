"""Measure how nearly whole models agree.

    python -m benchmarks.agreement       # writes benchmarks/results/agreement.json and docs/images/agreement.png

Each framework runs in a process of its own. Beside them runs PyTorch on weights that were moved by a rounding error:
nearer to each other than it comes to itself, no two frameworks can be expected.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lora_one import demo

from .compare import GIVEN_GRADIENTS, TOLERANCES, errors, loss_errors, other_way
from .job import Job, embedded, grouped, write_grouped, write_perturbed
from .picture import draw
from .record import Record, record
from .reference import reference

RESULTS = Path(__file__).parents[1] / "results" / "agreement.json"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "agreement.png"
RUNS = [("torch", "float32"), ("jax", "float32"), ("mlx", "float32"), ("torch", "float64"), ("jax", "float64")]
JOBS = {"embedded": embedded, "grouped": grouped}
PERTURBED = 3  # runs


def run_alone(model: str, folder: Path, framework: str, dtype: str) -> Record:
    """`record` in a process of its own, which loads no other framework."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        arguments = [model, str(folder), framework, dtype, file.name]
        subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.agreement", *arguments], check=True)
        with np.load(file.name) as arrays:
            return dict(arrays)


def write_record(model: str, folder: str, framework: str, dtype: str, out: str) -> None:
    """What `run_alone` runs."""
    module = importlib.import_module(f".on_{framework}", __package__)
    np.savez(out, **record(module.Runner(dtype), JOBS[model](Path(folder))))


def measure(model: str, folder: Path) -> dict[str, Any]:
    """All runs of a model: each pair of one dtype, each beside NumPy, and float32 beside float64."""
    job = JOBS[model](folder)
    records = {f"{framework} {dtype}": run_alone(model, folder, framework, dtype) for framework, dtype in RUNS}
    scaling, exact = job.config.scaling, records["torch float64"]
    compared = {}
    for dtype in TOLERANCES:
        names = [name for name in records if name.endswith(dtype)]
        compared |= {f"{a} / {b}": errors(records[a], records[b], scaling) for a, b in combinations(names, 2)}
        compared |= {f"{a} / numpy": errors(records[a], reference(records[a], job), scaling) for a in names}
    narrow = {name: each for name, each in records.items() if "float32" in name}
    return {
        "learning rate": job.learning_rate,
        "errors": compared,
        "losses, worst step, float32 / torch float64": {
            name: float(loss_errors(each, exact).max()) for name, each in narrow.items()
        },
        "factor entries": sum(each.size for key, each in exact.items() if key.startswith(("A0/", "B0/"))),
        "of them moved the other way by step 1": {
            name: other_way(each, exact, job.learning_rate) for name, each in narrow.items()
        },
        "perturbed": _perturbed(model, folder, exact, job),
        "losses": {name: each["losses"].tolist() for name, each in records.items()},
    }


def _perturbed(model: str, folder: Path, exact: Record, job: Job) -> dict[str, Any]:
    """PyTorch in float32 on weights that are a rounding error away, against float64 on the weights themselves."""
    records = []
    for seed in range(PERTURBED):
        with tempfile.TemporaryDirectory() as moved:
            write_perturbed(folder, Path(moved), seed)
            records.append(run_alone(model, Path(moved), "torch", "float32"))
    return {
        "losses, worst step": [float(loss_errors(each, exact).max()) for each in records],
        "moved the other way by step 1": [other_way(each, exact, job.learning_rate) for each in records],
        "losses": [each["losses"].tolist() for each in records],
    }


def show(model: str, found: dict[str, Any]) -> bool:
    """Print a table a dtype; whether all errors are within their tolerances."""
    agreed = True
    for dtype, tolerances in TOLERANCES.items():
        columns = {name: each for name, each in found["errors"].items() if dtype in name}
        by_numpy = [each for name, each in columns.items() if "numpy" in name]
        agreed = agreed and all(error <= GIVEN_GRADIENTS[dtype] for each in by_numpy for error in each.values())
        print(f"\n{model} model, {dtype}")
        print(" " * 26 + "".join(f"{name.replace(f' {dtype}', ''):>15}" for name in columns) + f"{'allowed':>10}")
        for quantity, allowed in tolerances.items():
            row = [each.get(quantity) for each in columns.values()]
            agreed = agreed and all(error <= allowed for error in row if error is not None)
            cells = "".join(f"{'' if error is None else f'{error:.1e}':>15}" for error in row)
            print(f"{quantity:<26}{cells}{allowed:>10.0e}")
        print(f"beside NumPy at most {GIVEN_GRADIENTS[dtype]:.0e} is allowed")
    for name in ("losses, worst step, float32 / torch float64", "of them moved the other way by step 1"):
        print(f"{name}: {found[name]}")
    print("perturbed:", {name: each for name, each in found["perturbed"].items() if name != "losses"})
    return agreed


def main() -> None:
    """Measure all, write the result and the picture, and fail if anything is further apart than it may be."""
    if len(sys.argv) > 1:
        write_record(*sys.argv[1:])
        return
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' progress bars
    with tempfile.TemporaryDirectory() as folder:
        write_grouped(Path(folder))
        measured = {"embedded": measure("embedded", demo.MODEL), "grouped": measure("grouped", Path(folder))}
    packages = ("torch", "transformers", "peft", "jax", "flax", "optax", "mlx", "mlx-lm", "numpy")
    result = {"versions": {name: version(name) for name in packages}, "tolerances": TOLERANCES, **measured}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(measured, PICTURE)
    agreed = all([show(model, found) for model, found in measured.items()])
    print("\n" + ("All agree." if agreed else "Some are further apart than they may be."))
    sys.exit(0 if agreed else 1)


if __name__ == "__main__":
    main()
