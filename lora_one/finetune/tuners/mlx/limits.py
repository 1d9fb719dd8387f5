"""What an mlx-lm model can be given: tokens, and how many of them.

MLX reads whatever lies behind the end of a table: nothing there says that a token or a position has no row.
"""

from typing import Any

import mlx.nn as nn

from lora_one.backends.mlx.tree import places
from lora_one.finetune.fit import Limits

_POSITIONS = ("wpe", "embed_positions", "position_embeddings")


def limits_of(model: nn.Module) -> Limits:
    """Read off the tables of a model that looks positions up, and off the configuration of one that rotates."""
    tokens: list[int] = []
    positions: list[int] = []
    for place in places(model):
        if isinstance(place.module, (nn.Embedding, nn.QuantizedEmbedding)):
            rows = int(place.module.weight.shape[0])
            (positions if place.path.split(".")[-1] in _POSITIONS else tokens).append(rows)
    arguments: Any = getattr(model, "args", None)
    inner = getattr(arguments, "text_config", None)
    trained = getattr(arguments, "max_position_embeddings", None)
    if isinstance(inner, dict):
        trained = inner.get("max_position_embeddings", trained)
    return Limits(max(tokens, default=None), min(positions, default=None), trained=trained)
