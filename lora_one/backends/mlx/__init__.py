"""MLX: arrays, models through mlx-lm's own LoRA layers, and the optimizer."""

from .files import load, merge, save
from .ops import MlxOps
from .optimizer import LoraOneAdamW, optimizer
from .plain import attach_plain
from .pretrained import load_pretrained
from .session import MlxSession, open_session
from .targets import last_layers

ops = MlxOps()

__all__ = [
    "LoraOneAdamW",
    "MlxOps",
    "MlxSession",
    "attach_plain",
    "last_layers",
    "load",
    "load_pretrained",
    "merge",
    "open_session",
    "ops",
    "optimizer",
    "save",
]
