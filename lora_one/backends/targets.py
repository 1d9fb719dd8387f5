"""The layers that `Config.targets` means, by the rules of PEFT, and the message of the error if it means none."""

import difflib
import re
from collections.abc import Iterable, Sequence

from lora_one.checkpoint.whole import ends_with_a_name, is_within
from lora_one.checks import shown_names
from lora_one.config import Config
from lora_one.errors import ModelError

Targets = str | Sequence[str]  # `Config.targets`

# Names that a language model's output layer usually has; "all-linear" leaves such a layer out.
OUTPUT_LAYERS = ("lm_head", "output_head", "logits")


def select(targets: Targets, linear: Iterable[str], whole: Sequence[str] = ()) -> list[str]:
    """Return the names that `targets` means, in their order.

    Args:
        linear: the paths of the model's linear layers.
        whole: the paths of the modules that are trained whole, in which "all-linear" means no layer.

    Raises:
        ModelError: `targets` means none of them, or one in a module that is trained whole.
    """
    linear = list(linear)
    if targets == "all-linear":
        chosen = [name for name in linear if not is_output_layer(name) and not is_within(name, whole)]
    else:
        chosen = [name for name in linear if matches(name, targets)]
        check_apart(chosen, whole)
    if not chosen:
        raise ModelError(no_match(targets, linear))
    return chosen


def modules_named(names: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Return the paths that `Config.modules_to_save` means, by PEFT's rule; of modules in one another the outermost.

    Args:
        modules: the paths of all modules of the model.

    Raises:
        ModelError: a name that is not the end of a path.
    """
    paths = list(modules)
    check_module_names(names, paths)
    chosen: list[str] = []
    for path in sorted(paths):
        if ends_with_a_name(path, names) and not is_within(path, chosen):
            chosen.append(path)
    return [path for path in paths if path in chosen]


def check_module_names(names: Sequence[str], paths: Sequence[str]) -> None:
    """Raise ModelError for names of `Config.modules_to_save` that the model does not have; PEFT ignores them."""
    unknown = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in paths)]
    if unknown:
        ends = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        near = [end for name in unknown for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=3)]
        top = ", ".join(path for path in paths if path and "." not in path)
        meant = f"; near names: {', '.join(dict.fromkeys(near))}" if near else ""
        raise ModelError(f"modules_to_save must name modules of the model, got {unknown}; at its top are: {top}{meant}")


def check_held(config: Config, parameters: Iterable[str]) -> None:
    """Raise ModelError where the Config asks for whole modules that a model with LoRA does not train whole.

    Args:
        parameters: the paths of those that it trains.
    """
    held = list(dict.fromkeys(path.rpartition(".")[0] for path in parameters))
    if not all(any(f".{name}." in f".{path}." for path in held) for name in config.modules_to_save):
        raise ModelError(
            f"a model with LoRA keeps its own settings, but the Config asks for modules_to_save "
            f"{config.modules_to_save} (the adapter's: {tuple(held)}): leave it out, or hand in the model without LoRA"
        )


def check_apart(targets: Iterable[str], whole: Sequence[str]) -> None:
    """Raise ModelError for targets in modules that are trained whole, which get no LoRA."""
    both = [path for path in targets if is_within(path, whole)]
    if both:
        raise ModelError(
            f"targets and modules_to_save must name different modules, got both for {shown_names(both)}: a module "
            "gets LoRA or is trained whole; leave it out of one of them"
        )


def matches(path: str, targets: Targets) -> bool:
    """Return whether a regular expression matches the whole path, or a name in a sequence is its end, or all of it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in targets)


def no_match(targets: Targets, linear: Sequence[str], none: str = "none") -> str:
    """Return the message of an error: `targets` means no linear layer.

    Args:
        linear: the paths of the model's linear layers.
        none: what the message says if there are no linear layers.
    """
    shown = shown_names(linear) or none
    return f"targets must match a linear layer of the model, got {targets!r}; its linear layers are: {shown}"


def is_output_layer(path: str) -> bool:
    """Return whether the path of a layer, or of a layer's weight, belongs to an output layer."""
    *parents, last = path.split(".")
    layer = parents[-1] if parents and last in ("kernel", "weight") else last
    return layer in OUTPUT_LAYERS
