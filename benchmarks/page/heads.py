"""A new head: random, or fitted first."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.results import Row, read_rows
from benchmarks.quality.summary import at_best_rate

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
        for name in ("LoRA", "LoRA-One"):
            s = at_best_rate(rows, task, name, 8)
            if s:
                score, loss = with_interval(s.score, 100), with_interval(s.test_loss, 1, 3)
                lines.append([f"{name}, {head} head", f"{s.rate:g}", str(s.score.count), score, loss])
    if not lines:
        return ""
    return (
        "\nAnd what comes of it (`python -m benchmarks.quality --tasks minilm minilm-random --only LoRA LoRA-One`), "
        "made before the protocol above, each at its best rate of 1, 2, 5, ... at one seed, "
        "with balance 0.5. The fitted head alone, before any training of the encoder, is right in "
        f"{100 * alone:.1f} %.\n\n" + table(["", "rate", "seeds", "accuracy, %", "test loss"], lines)
    )
