"""Rows of several examples in mlx-lm's models, whose layers ask their cache for the mask of the attention."""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from lora_one.backends.mlx.passes.batches import default_loss
from lora_one.errors import ConfigError
from lora_one.finetune.fit import Limits


class Apart:
    """What a layer takes for its cache: it keeps nothing, and its mask shows a token its own example only.

    Positions are counted through the row. Rotary ones, which act by their differences, need no more.
    """

    offset = 0

    def __init__(self, position_ids: mx.array):
        self._example = mx.cumsum(position_ids == 0, axis=1)  # (rows, length)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        same = self._example[:, :, None] == self._example[:, None]  # (rows, query, key)
        return create_causal_mask(length, window_size=window_size) & same[:, None]  # (rows, 1, query, key)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


def loss_of_rows(model: Any, batch: dict[str, mx.array]) -> mx.array:
    """Return the mean cross-entropy of a batch over the tokens that count; "position_ids" say that rows are packed."""
    positions = batch.get("position_ids")
    if positions is None:
        return default_loss(model, batch)
    packed: Any = partial(model, cache=[Apart(positions)] * len(make_prompt_cache(model)))
    return default_loss(packed, batch)


def check_packing(model: nn.Module, limits: Limits) -> None:
    """Raise ConfigError for a model that cannot keep the examples of a row apart."""
    caches = {type(cache).__name__ for cache in make_prompt_cache(model)}
    unfit = caches - {KVCache.__name__, RotatingKVCache.__name__}
    if unfit:
        raise ConfigError(
            f"packing needs attention in every layer, got layers with a state ({', '.join(sorted(unfit))}), which runs "
            "on from one example of a row to the next: leave packing out"
        )
    if limits.positions is not None:
        raise ConfigError(
            "packing needs rotary positions with MLX, got a model with a table of positions, which mlx-lm counts "
            "through the row: leave packing out"
        )
