"""A new head: random, or fitted first."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.plan import RANK, TODAY
from benchmarks.quality.results import Row, read_rows
from benchmarks.quality.summary import by_protocol

from .markdown import table, with_interval


def section(file: Path, runs: Path) -> str:
    """Overlap of the gradients (heads.json), and the quality after training (quality.json)."""
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    overlap = [
        [name, f"{shares['median']:.2f}", f"{shares['least']:.2f}", f"{shares['largest']:.2f}"]
        for name, shares in found["overlap"].items()
    ]
    return (
        "## A new head\n\n"
        "`python -m benchmarks.heads`: MiniLM as a classifier of word orders, LoRA in the encoder, the head trained "
        "along. The gradient that a start should read is the one below a fitted head. This is the share of its energy, "
        f"of the best possible at rank {found['rank']}, in the start's directions ({found['layers']} layers).\n\n"
        + table(["the start reads", "median layer", "least", "largest"], overlap)
        + _quality(read_rows(runs), found["fitted_head_alone"])
        + "\nHow to fit a head first: [guide/new-heads.md](../guide/new-heads.md).\n"
    )


def _quality(rows: Sequence[Row], alone: float) -> str:
    lines = []
    for task, head in (("minilm-random", "random"), ("minilm", "fitted")):
        for name, s in by_protocol(rows, task, RANK, ("LoRA", TODAY)).items():
            score, loss = with_interval(s.score, 100), with_interval(s.test_loss, 1, 3)
            lines.append([f"{name}, {head} head", f"{s.rate:g}", score, loss])
    if not lines:
        return ""
    return (
        f"\nAnd what comes of it at rank {RANK} by the protocol above, the head trained along. The fitted head alone, "
        f"before any training of the encoder, is right in {100 * alone:.1f} % of the older test items.\n\n"
        + table(["", "rate", "accuracy, %", "test loss"], lines)
    )
