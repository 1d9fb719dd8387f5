"""What the command says at its end."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from lora_one.cli.progress import Terminal
from lora_one.finetune.job import Outcome
from lora_one.finetune.recipe import make_recipe


@pytest.mark.parametrize(
    ("settings", "readers"),
    [
        ({}, "PEFT and vLLM"),
        ({"backend": "mlx"}, "mlx-lm and PEFT and vLLM"),
        ({"dora": True}, "PEFT"),
        ({"backend": "mlx", "modules_to_save": ["head"]}, "PEFT"),
    ],
)
def test_only_libraries_that_open_the_adapter_are_named(settings, readers):
    """vLLM refuses DoRA and modules that were trained whole, mlx-lm the latter."""
    console = Console(record=True, width=100, file=io.StringIO())
    with Terminal(console, make_recipe(settings)) as terminal:
        terminal.finish(Outcome(report=None, losses=[], before=None, after=None, out=Path("adapter")))
    assert f"Adapter: adapter (opens in {readers})\n" in console.export_text()
