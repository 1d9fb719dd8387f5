"""MLX: arrays, models through mlx-lm's own LoRA layers, and the optimizer."""

from .attach import last_layers
from .model import MlxSession
from .model import MlxSession as attach
from .ops import MlxOps
from .optimizer import LoraOneAdamW, optimizer

ops = MlxOps()

__all__ = ["LoraOneAdamW", "MlxOps", "MlxSession", "attach", "last_layers", "ops", "optimizer"]
