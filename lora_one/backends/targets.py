"""Which layers `Config.targets` means."""

import re
from collections.abc import Iterable, Sequence

from lora_one.errors import ModelError

# Names that the field gives a language model's output layer, which "all-linear" leaves out.
OUTPUT_LAYERS = ("lm_head", "output_head", "logits")


def select(targets: str | Sequence[str], linear: Iterable[str]) -> list[str]:
    """The names that are meant, of the model's linear layers. PEFT's meaning: a regular expression matches the whole
    path; a name in a sequence is a whole path or the end of one.

    Raises:
        ModelError: none is meant.
    """
    linear = list(linear)
    if targets == "all-linear":
        chosen = [name for name in linear if not is_output_layer(name)]
    elif isinstance(targets, str):
        chosen = [name for name in linear if re.fullmatch(targets, name)]
    else:
        chosen = [name for name in linear if any(name == t or name.endswith(f".{t}") for t in targets)]
    if not chosen:
        shown = ", ".join(linear[:8]) + (", ..." if len(linear) > 8 else "")
        raise ModelError(
            f"targets must match a linear layer of the model, got {targets!r}; its linear layers are: {shown or 'none'}"
        )
    return chosen


def is_output_layer(name: str) -> bool:
    """Whether a layer, or a weight by its whole path, is the output layer's."""
    *parents, last = name.split(".")
    layer = parents[-1] if parents and last in ("kernel", "weight") else last
    return layer in OUTPUT_LAYERS
