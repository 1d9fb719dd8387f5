"""docs/images/quality-*.png: the training loss against steps and against time. Needs matplotlib."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.quality.results import Row, trailing_mean
from benchmarks.quality.summary import Summary

from .comparisons import TITLES
from .quality import SHOWN, found

COLORS = {
    "LoRA": "tab:gray",
    "rsLoRA": "tab:blue",
    "PiSSA": "tab:purple",
    "LoRA-GA": "tab:green",
    "LoRA+": "tab:brown",
    "LoRA-One, balance 0.5": "tab:orange",
    "LoRA-One, balance 0": "tab:red",
}
WIDTH = 5  # of the trailing mean


def draw_all(rows: Sequence[Row], folder: Path) -> None:
    """A picture for each task and rank that has a table."""
    for task, rank in itertools.product(TITLES, SHOWN):
        summaries = [s for name, s in found(rows, task, rank).items() if name in COLORS]
        if summaries:
            title = f"{TITLES[task]}, rank {rank}"
            _draw(title, summaries).savefig(folder / f"quality-{task}-{rank}.png", dpi=100)


def _draw(title: str, summaries: Sequence[Summary]) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for summary in summaries:
        curves = np.array([trailing_mean(row["losses"], WIDTH) for row in summary.rows])  # (seeds, steps)
        mean = curves.mean(0)
        steps = np.arange(1, len(mean) + 1)
        seconds = summary.seconds_init + summary.seconds_train * steps / len(mean)
        style: dict[str, Any] = {"color": COLORS[summary.name], "lw": 2 if summary.name.startswith("LoRA-One") else 1.2}
        label = f"{summary.name} ({summary.rate:g})"
        left.plot(steps, mean, label=label, **style)
        right.plot(seconds, mean, **style)
    left.set(xlabel="step", ylabel=f"training loss, mean of {WIDTH} steps and all seeds", yscale="log")
    right.set(xlabel="processor seconds, the start included")
    left.legend(frameon=False, fontsize=8, title="at its best rate", title_fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25, which="both")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    figure.suptitle(title, fontsize=10)
    return figure
