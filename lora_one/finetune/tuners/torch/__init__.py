"""Fine-tuning a model in Hugging Face's format with PyTorch."""

from .opening import open_tuner

__all__ = ["open_tuner"]
