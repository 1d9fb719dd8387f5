"""Two measurements of the start alone: energy by passes, loss by gamma."""

import json
from pathlib import Path
from typing import Any

from .markdown import table

_ENERGY_TITLES = {
    "minilm, contrastive": "MiniLM, contrastive",
    "minilm": "MiniLM, word orders",
    "sort": "embedded Llama",
    "t5": "tiny T5",
}


def energy(file: Path) -> str:
    """How much of the best gradient a start holds."""
    if not file.exists():
        return ""
    rows = json.loads(file.read_text())["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    ways: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = f"{row['worst']:.4f}, {row['median']:.4f}, {row['told_worst']:.3f}"
        ways.setdefault(_way(row), {})[row["model"]] = cell
    lines = [[way, *(of.get(model, "") for model in models)] for way, of in ways.items()]
    return (
        "## How much of the gradient a start holds\n\n"
        "`python -m benchmarks.energy`: share of the best rank-r energy in the start's directions, of the worst layer "
        "and of the median one. The third number is what the report tells of the worst layer, without knowing the "
        "gradient. The default is one pass with 16 directions beyond the rank. "
        '"Sides alone" is the start of models whose rows a backend cannot see.\n\n'
        + table(["", *(_ENERGY_TITLES[model] for model in models)], lines)
    )


def _way(row: dict[str, Any]) -> str:
    parts = [f"{row['passes']} pass{'es' if row['passes'] > 1 else ''}", f"r = {row['rank']} + {row['oversample']}"]
    if not row["folds"]:
        parts.append("sides alone")
    if row["processes"] > 1:
        parts.append(f"{row['processes']} processes")
    return ", ".join(parts)


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
