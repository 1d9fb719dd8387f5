"""PEFT's starts that move a part of the base weights into the factors: PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lora_one.checkpoint.peft import AdapterFolder
from lora_one.checkpoint.plain_lora import keeps_base
from lora_one.errors import ModelError

# PEFT repeats these starts when it opens a folder: they depend only on the weight, which changes in the same way again.
# For the other starts no file holds the base weights that the factors were trained with.
_REPEATABLE = ("pissa", "olora", "loftq")


def check_base_is_whole(adapted: peft.PeftModel) -> None:
    """Check that no adapter moved a part of the base weights into its factors.

    LoRA-One's gradient belongs to the base model that is there; a changed one cannot be opened again from its files.

    Raises:
        ModelError: an adapter did.
    """
    configs: dict[str, Any] = adapted.peft_config
    for name, config in configs.items():
        start = getattr(config, "init_lora_weights", True)
        if not keeps_base(start):
            raise ModelError(
                f"adapter {name!r}: its start, init_lora_weights={start!r}, changed the base weights, so that without "
                "its factors as they were the model is not the base model; open the base model anew, without this "
                "adapter, and hand in that"
            )


def check_start(folder: AdapterFolder, adapted: peft.PeftModel | None) -> list[str]:
    """Return why a folder's factors do not fit the base weights, one sentence per problem.

    Args:
        adapted: the model whose adapter gets the folder's factors; None if PEFT will attach a new adapter.
    """
    start = folder.config.get("init_lora_weights", True)
    if adapted is None:
        if keeps_base(start) or str(start).lower() in _REPEATABLE:
            return []
        return [
            f"init_lora_weights={start!r}: it changed the base weights that the factors were trained with, and they "
            "cannot be made again from this folder: save the difference to the start as plain LoRA, with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        ]
    has: Any = getattr(adapted.peft_config[adapted.active_adapters[0]], "init_lora_weights", True)
    if start == has or (keeps_base(start) and keeps_base(has)):
        return []
    return [
        f"init_lora_weights: {start!r} in the folder and {has!r} in the model, whose base weights are therefore not "
        "the same: load the folder on the base model, without an adapter"
    ]


@contextmanager
def base_weights_kept(model: nn.Module, folder: AdapterFolder) -> Iterator[None]:
    """Restore, after an exception, the base weights that a folder's start changes in place."""
    kept = []
    if not keeps_base(folder.config.get("init_lora_weights", True)):
        config = peft.PeftConfig.from_pretrained(str(folder.path))
        targets = [layer for name, layer in model.named_modules() if check_target_module_exists(config, name)]
        weights = [layer.weight for layer in targets if isinstance(getattr(layer, "weight", None), nn.Parameter)]
        kept = [(weight, weight.detach().clone()) for weight in weights]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for weight, original in kept:
                weight.copy_(original)
        raise
