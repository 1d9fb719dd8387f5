"""Writes the table of docs/recipes.md from the recipes' own notes: `python -m benchmarks.recipe_table`."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "recipes"
PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- table: python -m benchmarks.recipe_table -->", "<!-- end of table -->"


def table() -> str:
    """A row for each reported result."""
    lines = ["| recipe | model and data | benchmark | reported | ours |", "|---|---|---|---|---|"]
    for file in sorted(FOLDER.glob("*.yaml")):
        notes = yaml.safe_load(file.read_text(encoding="utf-8"))["notes"]
        for result in notes["reported"]:
            value = "not known to us" if result["value"] is None else f"{result['value']:g} ({result['metric']})"
            lines.append(f"| `{file.name}` | {notes['about']} | {result['benchmark']} | {value} | {result['ours']} |")
    return "\n".join(lines)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    block = f"{BEGIN}\n{table()}\n{END}"
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: block, page, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
