"""Writes the table of docs/guide/recipes.md from the recipes' own notes: `python -m benchmarks.recipe_table`."""

from pathlib import Path

import yaml

from benchmarks.page.markdown import renew_table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "recipes"
PAGE = ROOT / "docs" / "guide" / "recipes.md"


def table() -> str:
    """A row for each reported result."""
    lines = ["| recipe | model and data | benchmark | reported | ours |", "|---|---|---|---|---|"]
    for file in sorted(FOLDER.glob("*.yaml")):
        notes = yaml.safe_load(file.read_text(encoding="utf-8"))["notes"]
        for result in notes["reported"]:
            value = "not known to us" if result["value"] is None else f"{result['value']:g} ({result['metric']})"
            lines.append(f"| `{file.name}` | {notes['about']} | {result['benchmark']} | {value} | {result['ours']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    renew_table(PAGE, "benchmarks.recipe_table", table())
