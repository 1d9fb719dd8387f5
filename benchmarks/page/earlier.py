"""Two measurements of the start alone: energy by passes, loss by gamma."""

import json
from pathlib import Path

from .markdown import table


def energy(file: Path) -> str:
    """How much of the best rank-8 gradient the sketch holds."""
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    lines = [
        [
            f"{row['passes']} passes, {row['k']} columns",
            f"{row['worst']:.4f}",
            f"{row['median']:.4f}",
            f"{row['estimate_worst']:.4f}",
        ]
        for row in found["rows"]
    ]
    return (
        "## How much of the gradient the sketch holds\n\n"
        f"`python -m benchmarks.energy`: share of the best rank-{found['rank']} energy in the factors, over "
        f"{found['layers']} layers of a pretrained encoder on text, beside what the report tells of the worst layer "
        "without knowing the gradient. The default has 24 columns, and here makes 4 passes.\n\n"
        + table(["", "worst layer", "median", "told"], lines)
    )


def gamma(file: Path) -> str:
    """The loss right after the start."""
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    cases = list(found)
    labels = [label for label in found[cases[0]] if not label.startswith("auto")]
    lines = [[_label(label), *(f"{found[case][label]['held_out']:.3f}" for case in cases)] for label in labels]
    chosen = [next(label for label in found[case] if label.startswith("auto")) for case in cases]
    lines.append(['"auto" chose', *(label.removeprefix("auto (").removesuffix(")") for label in chosen)])
    return (
        "## The start alone, by gamma\n\n`python -m benchmarks.gamma`: held-out loss right after the start, before any "
        "training.\n\n" + table(["gamma", *cases], lines)
    )


def _label(label: str) -> str:
    return "(the base model)" if label == "base" else label
