"""LoRA's usual start, for comparison: A random, B zero."""

import mlx.core as mx
import mlx.nn as nn

from lora_one.config import Config

from .attach import attach_lora, random_stream_kept


def attach_plain(model: nn.Module, config: Config) -> nn.Module:
    """Attach LoRA to a model, in place, with mlx-lm's own start; A is drawn by `config.seed`."""
    with random_stream_kept():
        mx.random.seed(config.seed)
        adapted = attach_lora(model, config)
        mx.eval(adapted.trainable_parameters())
    return adapted
