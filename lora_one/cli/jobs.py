"""`lora-one finetune` and `lora-one init`: the commands that work on a model."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .options import INIT_OPTIONS, OPTIONS, Setting, recipe_from, takes
from .output import output

if TYPE_CHECKING:
    from lora_one.finetune.job import Outcome
    from lora_one.finetune.progress import Progress
    from lora_one.finetune.recipe import Recipe


@takes(OPTIONS)
def finetune(config: Path | None, verbose: bool, as_json: bool, **settings: Setting) -> None:
    """Fine-tune a model with LoRA-One.

    Without options: the embedded model on the embedded task.
    """
    from lora_one.finetune.job import finetune as run

    _run(run, recipe_from(config, settings), verbose, as_json)


@takes(INIT_OPTIONS)
def init(config: Path | None, verbose: bool, as_json: bool, **settings: Setting) -> None:
    """Start LoRA and save the adapter, for a trainer of your own."""
    from lora_one.finetune.job import initialize_only

    _run(initialize_only, recipe_from(config, settings), verbose, as_json)


def _run(job: "Callable[[Recipe, Progress], Outcome]", recipe: "Recipe", verbose: bool, as_json: bool) -> None:
    from .progress import Terminal

    with output(as_json) as out:
        with Terminal(out.console, recipe, verbose) as terminal:
            outcome = job(recipe, terminal)
        terminal.finish(outcome)
        out.values = outcome.to_dict()
