"""One factor of LoRA-One at a time."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.results import Row, interval, read_rows, select
from benchmarks.quality.summary import FIRST, paired

from .markdown import table, with_interval
from .quality import score_name, signed

FOUR = "LoRA-One of the tables: four passes"
# Group -> its title, and what its others are compared with.
_GROUPS = {
    "passes": ("The start in one pass, today's default, in the place of four", FOUR),
    "sketch": ("How much of the gradient the start holds, by the four passes and fewer of the sketch before", "exact"),
    "init batches": ("Batches that the start reads", "8"),
    "gamma": ("gamma: the start's step is s / gamma", "128"),
    "reg": ("reg of the preconditioner", "1e-06"),
    "targets": ("Which layers", "all linear layers"),
}

HEAD = """## Ablations

`python -m benchmarks.quality --stages ablations --tasks sort --seeds 3`: one factor at a time, everything else as in
the tables above, at LoRA-One's best rate there (for reg at that of the preconditioned one). A seed changes the score by
about five points, so the last column but one compares within a seed; **bold** where the interval leaves out 0.

All LoRA-One rows on this page but those by the exact gradient and "one pass" were made with the start that was the
default before: four passes of a block Krylov sketch. The first tables hold today's default against it, at its rate.
"""


def section(file: Path) -> str:
    """All groups that have runs."""
    rows = read_rows(file)
    parts = [_group(rows, group, task) for task in dict.fromkeys(r["task"] for r in rows) for group in _GROUPS]
    parts = [part for part in parts if part]
    return "\n".join([HEAD, *parts]) if parts else ""


def _group(rows: Sequence[Row], group: str, task: str) -> str:
    mine = select(rows, task=task, group=group)
    if not mine:
        return ""
    title, reference = _GROUPS[group]
    if group == "passes":
        tables = select(rows, task=task, group="main", contender="LoRA-One", rank=8, rate=mine[0]["rate"])
        mine += [{**row, "contender": FOUR} for row in tables]
    energy = all("energy" in row for row in mine)
    lines = []
    for name in dict.fromkeys(row["contender"] for row in mine):
        runs = select(mine, contender=name)
        lead = None if name == reference else paired(runs, select(mine, contender=reference), "score")
        cells = [
            name,
            *([with_interval(interval([row["energy"] for row in runs]), 1, 3)] if energy else []),
            str(len(runs)),
            with_interval(interval([row["score"] for row in runs]), 100),
            with_interval(interval([row["test_loss"] for row in runs]), 1, 3),
            with_interval(interval([sum(row["losses"][:FIRST]) / FIRST for row in runs]), 1, 2),
            "" if lead is None else signed(lead),
            f"{sum(row['seconds_init'] for row in runs) / len(runs):.1f}",
        ]
        lines.append(cells)
    header = ["", *(["energy, worst layer"] if energy else []), "seeds", f"{score_name(task)}, %"]
    header += ["test loss", "loss of steps 1-20", f"points over {reference}", "seconds of the start"]
    return f"### {title} ({task}, rate {mine[0]['rate']:g})\n\n{table(header, lines)}"
