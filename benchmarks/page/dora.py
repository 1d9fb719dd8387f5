"""LoRA-One's start for DoRA, beside DoRA's own start and LoRA-One without magnitudes."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.results import Row, interval, read_rows, select
from benchmarks.quality.summary import at_best_rate, first_loss, paired

from .markdown import signed, table, with_interval

OURS = "LoRA-One, DoRA"
CONTENDERS = {"DoRA": "DoRA, its own start", "LoRA-One": "LoRA-One", OURS: "LoRA-One's start for DoRA"}
HOW = """## DoRA

`python -m benchmarks.quality --tasks sort desc --ranks 8 --only DoRA "LoRA-One, DoRA"` makes such runs by the protocol
above; these are older: rates 1, 2, 5, ..., the best one at one seed, and balance 0.5. DoRA is PEFT's, alpha 16, and has
a sweep of the rate as LoRA-One's start for it has; LoRA-One has its best rate. Differences are those of LoRA-One's
start for DoRA to the row, in points, paired by seed, with 95 % intervals; **bold** where the interval leaves out 0.
*First*: the mean loss of steps 1 to 20, which is lower than DoRA's own start has. By intervals LoRA-One's start for
DoRA is level with LoRA-One, and with DoRA. On desc the rate that is DoRA's best at one seed diverges at another, so the
next lower one has its line too.

"""


def section(file: Path) -> str:
    """One table of both tasks."""
    rows = read_rows(file)
    if not rows:
        return ""
    header = ["", "rate", "seeds", "exact match, %", "lead over it", "test loss", "first", "seconds of training"]
    lines = [line for task in ("sort", "desc") for line in _of_task(rows, task)]
    return HOW + table(header, lines) + "\nHow to use it: [guide/dora.md](../guide/dora.md).\n"


def _of_task(rows: Sequence[Row], task: str) -> list[list[str]]:
    """A line for each contender at its best rate, and for other rates that have several seeds."""
    of_task = select(rows, task=task, rank=8)
    best = {name: at_best_rate(of_task, task, name, 8) for name in CONTENDERS}
    ours = best[OURS]
    lines = []
    for name, summary in best.items():
        if summary is None or ours is None:
            continue
        mine = select(of_task, contender=name)
        others = sorted({row["rate"] for row in mine if row["seed"]} - {summary.rate})
        for rate in [summary.rate, *others]:
            at_rate = select(mine, rate=rate)
            lead = paired(ours.rows, at_rate, "score") if name != OURS else None
            lines.append(
                [
                    f"{task}: {CONTENDERS[name]}",
                    f"{rate:g}{'' if rate == summary.rate else ' (not its best at seed 0)'}",
                    str(len(at_rate)),
                    with_interval(interval([row["score"] for row in at_rate]), 100),
                    "" if lead is None else signed(lead),
                    with_interval(interval([row["test_loss"] for row in at_rate]), 1, 3),
                    with_interval(interval([first_loss(row) for row in at_rate]), 1, 2),
                    f"{sum(row['seconds_train'] for row in at_rate) / len(at_rate):.1f}",
                ]
            )
    return lines
