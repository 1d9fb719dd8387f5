"""The options of `lora-one finetune` and `lora-one init`, and the recipe that they make."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from lora_one.finetune.recipe import Recipe, make_recipe, read_recipe

Setting = str | int | float | bool | None
Command = TypeVar("Command", bound=Callable[..., None])

# name -> type and help. None means "not given", so that the configuration file's value, or the default, holds.
OPTIONS = {
    "model": Annotated[str | None, typer.Option("--model", help="Folder of a causal language model.")],
    "data": Annotated[str | None, typer.Option("--data", help="JSON Lines, or a folder with train.jsonl.")],
    "test": Annotated[str | None, typer.Option("--test", help="Held-out JSON Lines: exact match before and after.")],
    "backend": Annotated[str | None, typer.Option("--backend", help="torch, ...")],
    "dtype": Annotated[str | None, typer.Option("--dtype", help="Of the base weights: float32, bfloat16, float16.")],
    "device": Annotated[str | None, typer.Option("--device", help="cuda, cpu, ...")],
    "rank": Annotated[int | None, typer.Option("--rank", "-r")],
    "alpha": Annotated[float | None, typer.Option("--alpha")],
    "gamma": Annotated[str | None, typer.Option("--gamma", help='A number, or "auto".')],
    "targets": Annotated[str | None, typer.Option("--targets", help='"all-linear", names with commas, or a regex.')],
    "gradient": Annotated[str | None, typer.Option("--gradient", help="sketch or exact.")],
    "passes": Annotated[str | None, typer.Option("--passes", help='Over the batches of init: a number, or "auto".')],
    "init_batches": Annotated[int | None, typer.Option("--init-batches", help="Batches that the start reads.")],
    "steps": Annotated[int | None, typer.Option("--steps")],
    "batch_size": Annotated[int | None, typer.Option("--batch-size")],
    "max_length": Annotated[int | None, typer.Option("--max-length", help="Tokens that sequences are cut to.")],
    "learning_rate": Annotated[float | None, typer.Option("--learning-rate", "--lr")],
    "precondition": Annotated[bool | None, typer.Option("--precondition/--no-precondition")],
    "plain": Annotated[bool | None, typer.Option("--plain", help="LoRA's usual start, for comparison.")],
    "evaluate": Annotated[bool | None, typer.Option(help="Run the benchmarks that --config names.")],
    "limit": Annotated[int | None, typer.Option(help="Items of each benchmark at most.")],
    "allow_code_execution": Annotated[
        bool | None, typer.Option("--allow-code-execution", help="Let benchmarks run the code that the model writes.")
    ],
    "save_every": Annotated[int | None, typer.Option("--save-every", help="Steps between checkpoints.")],
    "resume": Annotated[
        bool | None, typer.Option("--resume", help="Go on from the last checkpoint in --out, if there is one.")
    ],
    "seed": Annotated[int | None, typer.Option("--seed")],
    "out": Annotated[str | None, typer.Option("--out", help="Folder for the adapter.")],
    "config": Annotated[Path | None, typer.Option("--config", help="YAML or TOML with any of these settings.")],
    "verbose": Annotated[bool, typer.Option("--verbose", help="Show what other libraries say, and tracebacks.")],
}
TRAINING_ONLY = {
    *("test", "steps", "learning_rate", "precondition", "plain"),
    *("evaluate", "limit", "allow_code_execution", "save_every", "resume"),
}
INIT_OPTIONS = [name for name in OPTIONS if name not in TRAINING_ONLY]


def takes(names: Iterable[str]) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the named options.

    Typer reads a command's options from its signature. The command gets them as keyword arguments.
    """
    signature = inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if name == "verbose" else None,
                annotation=OPTIONS[name],
            )
            for name in names
        ]
    )

    def decorate(command: Command) -> Command:
        vars(command)["__signature__"] = signature
        return command

    return decorate


def recipe_from(config: Path | None, settings: Mapping[str, Setting]) -> Recipe:
    """Return the recipe of a configuration file, where options on the command line override the file's settings.

    Args:
        config: a YAML or TOML file; None for the defaults.
        settings: option -> value; None where the option was not given.
    """
    given: dict[str, object] = {name: value for name, value in settings.items() if value is not None}
    for name, number in (("gamma", float), ("passes", int)):
        text = settings.get(name)
        if isinstance(text, str) and text != "auto":
            try:
                given[name] = number(text)
            except ValueError:
                raise typer.BadParameter(f'--{name} must be a number or "auto", got {text!r}') from None
    targets = settings.get("targets")
    if isinstance(targets, str) and "," in targets and not any(character in targets for character in "()[]{}*+?|\\"):
        given["targets"] = [name.strip() for name in targets.split(",")]
    if "steps" in given:
        given["epochs"] = None  # or the file's epochs would override the given steps
    return make_recipe({**(read_recipe(config) if config else {}), **given})
