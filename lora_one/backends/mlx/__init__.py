"""MLX: arrays, models through mlx-lm's own LoRA layers, and the optimizer."""

from .ops import MlxOps

ops = MlxOps()

__all__ = ["MlxOps", "ops"]
