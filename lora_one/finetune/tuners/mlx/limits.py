"""The tokens, and the number of them, that an mlx-lm model accepts.

MLX does not check indices: a token or a position without a row reads whatever lies behind the end of the table.
"""

from typing import Any

import mlx.nn as nn

from lora_one.backends.mlx.tree import places
from lora_one.finetune.fit import Limits

_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")


def limits_of(model: nn.Module) -> Limits:
    """Return the limits of a model, from its embedding tables and from its configuration.

    A model that looks positions up has a table of them. For one with rotary embeddings, the configuration says how
    long the sequences of its training were.
    """
    tokens: list[int] = []
    positions: list[int] = []
    for place in places(model):
        if isinstance(place.module, (nn.Embedding, nn.QuantizedEmbedding)):
            rows = int(place.module.weight.shape[0])
            (positions if place.path.split(".")[-1] in _POSITION_TABLES else tokens).append(rows)
    arguments: Any = getattr(model, "args", None)
    text_config = getattr(arguments, "text_config", None)
    trained = getattr(arguments, "max_position_embeddings", None)
    if isinstance(text_config, dict):
        trained = text_config.get("max_position_embeddings", trained)
    return Limits(max(tokens, default=None), min(positions, default=None), trained=trained)
