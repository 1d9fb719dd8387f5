"""The recipe of a new head in docs/guide/new-heads.md, run as it stands there, on any framework."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lora_one

HEADS = Path(__file__).parents[2] / "docs" / "guide" / "new-heads.md"


def run_recipe(framework: str, steps: str, batches: Sequence[Any], forget_head: Callable[[Any], None]) -> None:
    """Assert that the fit lowers the loss, and that the adapter in the folder "adapter" carries the head.

    Args:
        framework: the heading that the recipe stands below.
        steps: a regular expression for the lines at which the fit of the head and the fine-tuning begin.
        forget_head: takes the numbers out of the head of a model, which the adapter's replace.
    """
    page = HEADS.read_text(encoding="utf-8")
    code = re.search(rf"## {framework}\n.*?```python\n(.*?)```", page, re.DOTALL)[1].replace("...\n", "")
    setup, fit, rest = re.split(rf"(?={steps})", code, flags=re.MULTILINE)
    names: dict = {"batches": batches}

    def loss() -> float:
        return sum(float(names["loss_fn"](names["model"], batch)) for batch in batches)

    exec(setup, names)
    untrained = loss()
    exec(fit, names)
    assert loss() < 0.8 * untrained
    exec(rest, names)
    expected = np.array(names["model"](batches[0][0]))
    exec(setup, names)
    forget_head(names["model"])
    again = lora_one.load(names["model"], "adapter")
    np.testing.assert_array_equal(np.array(again(batches[0][0])), expected)
