"""Fine-tuning a language model with MLX."""

from .tuner import open_tuner

__all__ = ["open_tuner"]
