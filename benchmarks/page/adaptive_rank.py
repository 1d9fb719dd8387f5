"""Ranks that follow the gradients, at equal parameters, beside uniform ones and two peers' ways to spread them."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.results import Row, read_rows
from benchmarks.quality.summary import at_best_rate, paired

from .markdown import signed, table, with_interval

UNIFORM = "LoRA-One"
CONTENDERS = {
    UNIFORM: "LoRA-One, rank 8 everywhere",
    "LoRA-One, adaptive rank": "LoRA-One, `rank_max=32`: by (S_i / S_1)²",
    "LoRA-One, adaptive rank by shares": "the same by S_i² / ΣS²",
    "LoRA-One, adaptive rank by energy": "the same by S_i²",
    "EVA": "EVA, rho 2",
    "AdaLoRA": "AdaLoRA, 12 to 8",
}
HOW = """## Ranks that follow the gradients

`python -m benchmarks.quality --tasks sort desc --ranks 8 --only "LoRA-One, adaptive rank" EVA AdaLoRA` makes such runs
by the protocol above; these are older: a sweep of the rates 1, 2, 5, ... for each at one seed, then its best one on
five, with balance 0.5. The budget is rank 8 everywhere; EVA counts ranks in the place of parameters, and AdaLoRA trains
rank 12 and prunes it to a mean of 8. Both are PEFT's. The start may go by several measures of a direction's worth; the
one in use is compared with two others. Differences are paired by seed, with 95 % intervals; **bold** where the interval
leaves out 0. No way to spread the ranks is better than uniform ones here, so these are the default.

"""


def section(file: Path) -> str:
    """One table of both tasks."""
    rows = read_rows(file)
    if not rows:
        return ""
    header = ["", "rate", "seeds", "parameters", "exact match, %", "points over uniform", "test loss", "over uniform"]
    lines = [line for task in ("sort", "desc") for line in _of_task(rows, task)]
    return HOW + table(header, lines) + "\nHow to use it: [guide/adaptive-rank.md](../guide/adaptive-rank.md).\n"


def _of_task(rows: Sequence[Row], task: str) -> list[list[str]]:
    summaries = {name: at_best_rate(rows, task, name, 8) for name in CONTENDERS}
    uniform = summaries[UNIFORM]
    lines = []
    for name, summary in summaries.items():
        if summary is None or uniform is None:
            continue
        score, loss = (paired(summary.rows, uniform.rows, measure) for measure in ("score", "test_loss"))
        lines.append(
            [
                f"{task}: {CONTENDERS[name]}",
                f"{summary.rate:g}",
                str(summary.score.count),
                str(summary.rows[0]["parameters"]),
                with_interval(summary.score, 100),
                "" if score is None or name == UNIFORM else signed(score),
                with_interval(summary.test_loss, 1, 3),
                "" if loss is None or name == UNIFORM else signed(loss, 1, 3),
            ]
        )
    return lines
