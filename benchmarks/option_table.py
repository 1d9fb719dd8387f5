"""Writes the table of docs/guide/command.md from the command's own options: `python -m benchmarks.option_table`."""

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.page.markdown import renew_table
from lora_one.cli.options import flags, help_texts, settings
from lora_one.config import Config
from lora_one.finetune.recipe import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "command.md"


def table() -> str:
    """A row for each setting: its option, its default, and what it is."""
    defaults = {field.name: field.default for cls in (Config, Recipe) for field in dataclasses.fields(cls)}
    texts = help_texts()
    lines = ["| option | default | |", "|---|---|---|"]
    for name in settings():
        options = ", ".join(f"`{flag}`" for flag in flags(name))
        text = texts[name].replace("|", "\\|")
        lines.append(f"| {options} | {_shown(defaults[name])} | {text} |")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    return "" if default in (None, ()) else str(default)


if __name__ == "__main__":
    renew_table(PAGE, "benchmarks.option_table", table())
