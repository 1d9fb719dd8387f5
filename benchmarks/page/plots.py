"""docs/images/quality-*.png: the training loss against steps and against time. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.quality.results import Row, trailing_mean
from benchmarks.quality.summary import Summary

from .quality import TITLES, summaries

COLORS = {
    "full fine-tuning": "black",
    "LoRA": "tab:gray",
    "rsLoRA": "tab:blue",
    "PiSSA": "tab:purple",
    "LoRA-GA": "tab:green",
    "LoRA+": "tab:brown",
    "LoRA-One": "tab:orange",
}
WIDTH = 5  # of the trailing mean


def draw_all(rows: Sequence[Row], folder: Path) -> None:
    """A picture a task that has runs."""
    for task in TITLES:
        found = [s for s in summaries(rows, task, 8) if s.name in COLORS]
        if found:
            _draw(TITLES[task], found).savefig(folder / f"quality-{task}.png", dpi=100)


def _draw(title: str, found: Sequence[Summary]) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for summary in found:
        curves = np.array([trailing_mean(row["losses"], WIDTH) for row in summary.rows])  # (seeds, steps)
        mean = curves.mean(0)
        steps = np.arange(1, len(mean) + 1)
        seconds = summary.seconds_init + summary.seconds_train * steps / len(mean)
        style: dict[str, Any] = {"color": COLORS[summary.name], "lw": 2 if summary.name == "LoRA-One" else 1.2}
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
