"""One factor of LoRA-One at a time."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.results import Row, interval, read_rows, select
from benchmarks.quality.summary import first_loss, mean, paired

from .markdown import score_name, signed, table, with_interval

# Group -> its title, and what its others are compared with.
_GROUPS = {
    "sketch": ("How much of the gradient the start holds", "exact"),
    "init batches": ("Batches that the start reads", "8"),
    "gamma": ("gamma: the start's step is s / gamma", "128"),
    "reg": ("reg of the preconditioner", "1e-06"),
    "targets": ("Which layers", "all linear layers"),
    "rate of B": ("B's rate over A's, each at its own best rate of A", "1"),
}

HEAD = """## Ablations

`python -m benchmarks.quality --stages ablations --tasks sort --seeds 3`: one factor at a time at rank 8, everything
else as in the tables above. These runs are older than the protocol: the rate is the best of 1, 2, 5, ... at one seed,
the test items are others, the balance is 0.5, and but for "exact" the start read the batches four times. So compare
within a table, not with the tables above. A seed changes the score by about five points, so the last column but one
compares within a seed; **bold** where the interval leaves out 0.
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
            with_interval(interval([first_loss(row) for row in runs]), 1, 2),
            "" if lead is None else signed(lead),
            f"{mean(runs, 'seconds_init'):.1f}",
        ]
        lines.append(cells)
    rates = {row["rate"] for row in mine}
    rate = f", rate {rates.pop():g}" if len(rates) == 1 else ""
    header = ["", *(["energy, worst layer"] if energy else []), "seeds", f"{score_name(task)}, %"]
    header += ["test loss", "loss of steps 1-20", f"points over {reference}", "seconds of the start"]
    return f"### {title} ({task}{rate})\n\n{table(header, lines)}"
