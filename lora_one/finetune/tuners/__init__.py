"""What the command needs of a framework, a language model that it can fine-tune: one module per framework."""

from .loading import load_tuner

__all__ = ["load_tuner"]
