"""MLX: arrays, models with mlx-lm's own LoRA layers, and the optimizer."""

from .attach import attach_plain
from .files import load, save
from .lora_adamw import LoraOneAdamW
from .merge import merge
from .ops import MlxOps
from .optimizer import optimizer
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
