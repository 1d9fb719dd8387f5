"""One factor of LoRA-One at a time."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.results import Row, interval, read_rows, select
from benchmarks.quality.summary import FIRST

from .markdown import table, with_interval

_GROUPS = {
    "sketch": "How much of the gradient the sketch holds",
    "init batches": "Batches that the start reads",
    "gamma": "gamma: the start's step is s / gamma",
    "reg": "reg of the preconditioner",
    "targets": "Which layers",
}

HEAD = """## Ablations

`python -m benchmarks.quality --stages ablations --tasks sort --seeds 3`: one factor at a time, everything else as in
the tables above, at LoRA-One's best rate there (for reg at that of the preconditioned one). A seed changes the score by
about five points, so that a single one tells only what is far apart.
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
    energy = any("energy" in row for row in mine)
    lines = []
    for name in dict.fromkeys(row["contender"] for row in mine):
        runs = select(mine, contender=name)
        cells = [
            name,
            *([with_interval(interval([row["energy"] for row in runs]), 1, 3)] if energy else []),
            str(len(runs)),
            with_interval(interval([row["score"] for row in runs]), 100),
            with_interval(interval([row["test_loss"] for row in runs]), 1, 3),
            with_interval(interval([sum(row["losses"][:FIRST]) / FIRST for row in runs]), 1, 2),
            f"{sum(row['seconds_init'] for row in runs) / len(runs):.1f}",
        ]
        lines.append(cells)
    header = ["", *(["energy, worst layer"] if energy else []), "seeds", "exact match, %", "test loss"]
    header += ["loss of steps 1-20", "seconds of the start"]
    return f"### {_GROUPS[group]} ({task}, rate {mine[0]['rate']:g})\n\n{table(header, lines)}"
