"""Tables of what the code and the recipes say of themselves."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from lora_one.cli.options import flags, help_texts, settings
from lora_one.config import Config
from lora_one.finetune.recipe import Recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def options() -> str:
    """A row for each setting of the command: its option, its default, and what it is."""
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


def recipes() -> str:
    """A row for each result that the recipes' notes report."""
    lines = ["| recipe | model and data | benchmark | reported | ours |", "|---|---|---|---|---|"]
    for file in sorted(RECIPES.glob("*.yaml")):
        notes = yaml.safe_load(file.read_text(encoding="utf-8"))["notes"]
        for result in notes["reported"]:
            value = (
                "not known to us" if result["value"] is None else f"{result['value']:g} ({result['metric']}), as listed"
            )
            lines.append(f"| `{file.name}` | {notes['about']} | {result['benchmark']} | {value} | {result['ours']} |")
    return "\n".join(lines)
