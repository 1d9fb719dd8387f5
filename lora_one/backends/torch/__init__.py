"""PyTorch: arrays, models through PEFT's own LoRA layers, and the optimizer."""

from .attachment.attach import attach_plain
from .files.folder import load, save
from .merge import merge
from .ops import TorchOps
from .optimizer import LoraOneAdamW, optimizer
from .session import TorchSession
from .session import TorchSession as attach

ops = TorchOps()

__all__ = [
    "LoraOneAdamW",
    "TorchOps",
    "TorchSession",
    "attach",
    "attach_plain",
    "load",
    "merge",
    "ops",
    "optimizer",
    "save",
]
