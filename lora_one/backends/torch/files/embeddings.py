"""Embeddings with rows for new tokens: they do not belong to the adapter, but it is useless without them."""

from typing import Any

import peft
from torch import Tensor, nn
from transformers import PreTrainedModel

from .state import PREFIX

_WRAPPERS = ("original_module", "base_layer")  # where PEFT keeps the module that it wraps
_INFIXES = {*_WRAPPERS, "token_adapter", "modules_to_save"}


def added_rows(model: peft.PeftModel) -> dict[str, Tensor]:
    """Return the input and the output embedding, if tokens were added to the base model: PEFT's key -> weight.

    Tied embeddings are returned once; they are tied again when they are loaded.
    """
    base: Any = model.get_base_model()
    if not isinstance(base, PreTrainedModel) or base_vocabulary(base) in (None, _vocabulary(base.config)):
        return {}
    tensors = model.state_dict(keep_vars=True)
    embeddings: dict[int, tuple[str, Tensor]] = {}
    for path in embedding_paths(base):
        own = {id(parameter) for parameter in _unwrapped(base.get_submodule(path)).parameters()}
        for key, tensor in tensors.items():
            if key.startswith(f"{PREFIX}{path}.") and id(tensor) in own:
                embeddings.setdefault(id(tensor), (key, tensor))
    return dict(embeddings.values())


def base_vocabulary(base: PreTrainedModel) -> int | None:
    """Return how many tokens the model had when it was loaded, by the configuration in the place it came from.

    None if that is unknown: the model was made in memory, or its folder is gone. Nothing is downloaded.
    """
    name = getattr(base, "name_or_path", None)
    if not name:
        return None
    try:
        return _vocabulary(type(base.config).from_pretrained(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def embedding_paths(base: nn.Module) -> list[str]:
    """Return the paths of the input and the output embedding of a transformers model."""
    if not isinstance(base, PreTrainedModel):
        return []
    try:
        embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    except NotImplementedError:  # image models
        return []
    return [path for path, module in base.named_modules() if any(module is embedding for embedding in embeddings)]


def base_path(key: str) -> str:
    """Return the path that a parameter has in the base model without PEFT's wrappers."""
    return ".".join(part for part in key.removeprefix(PREFIX).split(".") if part not in _INFIXES)


def is_wrapped(key: str) -> bool:
    """Return whether a key names something inside one of PEFT's wrappers."""
    return not _INFIXES.isdisjoint(key.split("."))


def _unwrapped(module: nn.Module) -> nn.Module:
    for name in _WRAPPERS:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return module


def _vocabulary(config: Any) -> int | None:
    if hasattr(config, "vocab_size"):
        return int(config.vocab_size)
    return getattr(config.get_text_config(), "vocab_size", None)
