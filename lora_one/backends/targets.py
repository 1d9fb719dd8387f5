"""The layers that `Config.targets` means, by the rules of PEFT, and the message of the error if it means none."""

import re
from collections.abc import Iterable, Sequence

from lora_one.checks import shown_names
from lora_one.errors import ModelError

Targets = str | Sequence[str]  # `Config.targets`

# Names that a language model's output layer usually has; "all-linear" leaves such a layer out.
OUTPUT_LAYERS = ("lm_head", "output_head", "logits")


def select(targets: Targets, linear: Iterable[str]) -> list[str]:
    """Return the names that `targets` means, in their order.

    Args:
        linear: the paths of the model's linear layers.

    Raises:
        ModelError: `targets` means none of them.
    """
    linear = list(linear)
    if targets == "all-linear":
        chosen = [name for name in linear if not is_output_layer(name)]
    else:
        chosen = [name for name in linear if matches(name, targets)]
    if not chosen:
        raise ModelError(no_match(targets, linear))
    return chosen


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
