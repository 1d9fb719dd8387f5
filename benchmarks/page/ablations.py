"""One factor of LoRA-One at a time."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.plan import FASTER_B, TODAY
from benchmarks.quality.results import Row, interval, read_rows, select
from benchmarks.quality.summary import first_loss, mean, paired

from .comparisons import compare, variants_table
from .markdown import score_name, signed, table, with_interval

# Group -> its title, and what its others are compared with.
_GROUPS = {
    "gradient": ("How the start reads the gradient", "one pass"),
    "init batches": ("Batches that the start reads", "8"),
    "gamma": ("gamma: the start's step is s / gamma", "128"),
    "reg": ("reg of the preconditioner", "1e-06"),
    "targets": ("Which layers", "all linear layers"),
}

HEAD = """## Ablations

`python -m benchmarks.quality --stages ablations --tasks sort`: one factor at a time at rank 8, everything else as in
the tables above, the rate as well; the first five of the test seeds. A seed changes the score by about five points, so
the last column but one compares within a seed; **bold** where a 95 % interval leaves out 0, uncorrected.
"""
FASTER = """### B at a higher rate than A

What LoRA+ does, from LoRA-One's start: points over the same rate for both, each with its own search for A's rate.

"""


def section(file: Path, runs: Path) -> str:
    """All groups that have runs in ablations.json; B's rate, whose runs are in quality.json."""
    rows = read_rows(file)
    parts = [_group(rows, group, task) for task in dict.fromkeys(r["task"] for r in rows) for group in _GROUPS]
    parts = [part for part in (*parts, _faster_b(read_rows(runs))) if part]
    return "\n".join([HEAD, *parts]) if parts else ""


def _faster_b(rows: Sequence[Row]) -> str:
    comparisons = compare(rows, FASTER_B, (TODAY,))
    return FASTER + variants_table(comparisons, FASTER_B) if comparisons else ""


def _group(rows: Sequence[Row], group: str, task: str) -> str:
    mine = select(rows, task=task, group=group)
    if not mine:
        return ""
    title, reference = _GROUPS[group]
    lines = []
    for name in dict.fromkeys(row["contender"] for row in mine):
        runs = select(mine, contender=name)
        lead = None if name == reference else paired(runs, select(mine, contender=reference), "score")
        cells = [
            name,
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
    header = ["", "seeds", f"{score_name(task)}, %", "test loss", "loss of steps 1-20", f"points over {reference}"]
    header += ["seconds of the start"]
    return f"### {title} ({task}{rate})\n\n{table(header, lines)}"
