"""Does a random head spoil the start? MiniLM as a classifier of word orders, its head random or fitted first.

    python -m benchmarks.heads
    python -m benchmarks.quality --tasks minilm minilm-random --only LoRA LoRA-One      what comes of it

How much of the gradient below the fitted head lies in the directions that a start would take from the gradient below a
random head, from that below the fitted head on other batches, and in random directions? Writes results/heads.json.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.energy import exact_gradients, shares_of_best
from benchmarks.quality.task import Task
from benchmarks.quality.tasks import word_order
from lora_one.core.factors import Factors

RESULT = Path(__file__).parent / "results" / "heads.json"
RANK = 8


def gradients(task: Task, batches: list[Any]) -> dict[str, np.ndarray]:
    """The exact gradients of the target layers, (out, in)."""
    return exact_gradients(task.base, batches, task.loss_fn, task.targets)


def leading(matrices: dict[str, np.ndarray]) -> dict[str, Factors]:
    """The leading singular vectors of each, as factors."""
    found = {}
    for name, g in matrices.items():
        u, _, vt = np.linalg.svd(g, full_matrices=False)
        found[name] = Factors(vt[:RANK], u[:, :RANK])
    return found


def starts(random: Task, fitted: Task) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Factors]]]:
    """The gradient below the fitted head, and the directions that several starts would take."""
    batches = fitted.start_batches(0)
    wanted = gradients(fitted, batches)
    rng = np.random.default_rng(0)
    return wanted, {
        "fitted head, the same batches": leading(wanted),
        "fitted head, other batches": leading(gradients(fitted, fitted.start_batches(1))),
        "random head, the same batches": leading(gradients(random, batches)),
        "nothing: random directions": leading({name: rng.standard_normal(g.shape) for name, g in wanted.items()}),
    }


def main() -> None:
    """Measure, print, and write benchmarks/results/heads.json."""
    random, fitted = word_order(fit_head_on=0), word_order(fit_head_on=4096)
    wanted, taken = starts(random, fitted)
    overlap = {}
    for label, factors in taken.items():
        shares = list(shares_of_best(wanted, factors).values())
        overlap[label] = {"median": float(np.median(shares)), "least": min(shares), "largest": max(shares)}
        print(f"{label:32} " + "  ".join(f"{name} {share:.3f}" for name, share in overlap[label].items()), flush=True)
    found = {
        "rank": RANK,
        "layers": len(wanted),
        "fitted_head_alone": fitted.score(fitted.base, fitted.test),
        "overlap": overlap,
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
