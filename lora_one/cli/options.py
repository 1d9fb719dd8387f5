"""The options of `lora-one finetune` and `lora-one init`: one for each setting of `Recipe` and `Config`.

Their names, types and help come from the two classes and from what their docstrings say of each attribute.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from lora_one.config import Config
from lora_one.files.settings import alternatives
from lora_one.finetune.recipe import Recipe, make_recipe, read_recipe

from .output import AsJson
from .values import one_of

Setting = str | int | float | bool | None
Command = TypeVar("Command", bound=Callable[..., None])

OTHER_NAMES = {
    "rank": ["-r"],
    "learning_rate": ["--lr"],
    "save_every": ["--save-steps"],
    "eval_every": ["--eval-steps"],
}
# What a shell completes settings to whose types do not say it.
VALUES = {
    "backend": ("torch", "jax", "mlx"),
    "gamma": ("auto",),
    "passes": ("auto",),
    "recompute": ("auto", "true", "false"),
    "targets": ("all-linear",),
    "metrics": ("exact_match", "matthews"),
    "report_to": ("tensorboard", "trackio", "wandb"),
}
# The settings of `Recipe` that a start without training reads.
FOR_INIT = {
    *("model", "data", "loss_on", "chat_template", "packing", "max_length", "backend", "dtype", "device"),
    *("init_batches", "batch_size", "seed", "out"),
}


def settings() -> dict[str, Any]:
    """Return the type of each setting that has an option, first those of `Recipe`, then those of `Config`."""
    hints = {**typing.get_type_hints(Config), **typing.get_type_hints(Recipe)}
    names = [field.name for cls in (Recipe, Config) for field in dataclasses.fields(cls)]
    return {name: hints[name] for name in dict.fromkeys(names) if name != "config" and _option_type(hints[name])}


def help_texts() -> dict[str, str]:
    """Return what the docstrings of `Recipe` and `Config` say of each setting."""
    texts = {}
    for cls in (Config, Recipe):
        block = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for entry in re.split(r"\n    (?! )", "\n" + block)[1:]:
            name, _, text = entry.partition(": ")
            text = " ".join(text.split())
            texts[name] = text[:1].upper() + text[1:]
    return texts


def flags(name: str) -> list[str]:
    """Return the names of a setting's option, for instance ["--rank", "-r"]."""
    flag = name.replace("_", "-")
    both = _option_type(settings()[name]) is bool
    return [f"--{flag}/--no-{flag}" if both else f"--{flag}", *OTHER_NAMES.get(name, [])]


def _option_type(hint: Any) -> Any:
    """Return the type of the option for a setting, or None for a setting that needs a file."""
    allowed = alternatives(hint) - {type(None)}
    for kind in (bool, int, float):
        if allowed == {kind}:
            return kind
    texts = any(kind is str or isinstance(kind, str) or _is_list(kind) for kind in allowed)
    return str if texts else None  # a number or "auto", for one, is read by `make_recipe`


def _is_list(kind: Any) -> bool:
    """Return whether a type is a list of texts, which an option takes with commas."""
    return typing.get_origin(kind) in (tuple, Sequence) and str in alternatives(typing.get_args(kind)[0])


def _options() -> dict[str, Any]:
    """Return name -> type and help. None means "not given", so that the file's value, or the default, holds."""
    texts = help_texts()
    options: dict[str, Any] = {
        name: Annotated[
            _option_type(hint) | None,
            typer.Option(*flags(name), help=texts[name], autocompletion=_completion(name, hint)),
        ]
        for name, hint in settings().items()
    }
    options["config"] = Annotated[
        Path | None, typer.Option("--config", help="YAML or TOML with any of these settings.")
    ]
    options["verbose"] = Annotated[
        bool, typer.Option("--verbose", help="Show what other libraries say, and tracebacks.")
    ]
    options["as_json"] = AsJson
    return options


def _completion(name: str, hint: Any) -> Callable[[str], list[str]] | None:
    """Return what completes a setting's value; None where no values are known, so that the shell offers files."""
    values = VALUES.get(name) or sorted(value for value in alternatives(hint) if isinstance(value, str))
    return one_of(values) if values else None


OPTIONS = _options()
_INIT = {*FOR_INIT, *(field.name for field in dataclasses.fields(Config)), "config", "verbose", "as_json"}
INIT_OPTIONS = [name for name in OPTIONS if name in _INIT]


def takes(names: Iterable[str]) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the named options.

    Typer reads a command's options from its signature. The command gets them as keyword arguments.
    """
    signature = inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if name in ("verbose", "as_json") else None,
                annotation=OPTIONS[name],
            )
            for name in names
        ]
    )

    def decorate(command: Command) -> Command:
        vars(command)["__signature__"] = signature
        return command

    return decorate


def recipe_from(config: Path | None, given: Mapping[str, Setting]) -> Recipe:
    """Return the recipe of a configuration file, where options on the command line override the file's settings.

    Args:
        config: a YAML or TOML file; None for the defaults.
        given: option -> value; None where the option was not given.
    """
    hints = settings()
    values = {name: _value(value, hints[name]) for name, value in given.items() if value is not None}
    if "steps" in values:
        values["epochs"] = None  # or the file's epochs would override the given steps
    if "warmup" in values:
        values["warmup_ratio"] = None
    return make_recipe({**(read_recipe(config) if config else {}), **values})


def _value(value: Setting, hint: Any) -> object:
    """Return what an option's text stands for: a list, or true or false beside another text."""
    allowed = alternatives(hint)
    if not isinstance(value, str):
        return value
    if bool in allowed and value in ("true", "false"):
        return value == "true"
    listed = any(map(_is_list, allowed))
    is_pattern = any(character in value for character in "()[]{}*+?|\\")
    is_name = re.fullmatch(r"[\w.]+", value) is not None  # one name is a list of one, as "all-linear" is not
    alone = str in allowed and (is_pattern or not ("," in value or is_name))
    return [part.strip() for part in value.split(",")] if listed and not alone else value
