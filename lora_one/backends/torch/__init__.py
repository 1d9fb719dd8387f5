"""PyTorch: arrays, models through PEFT's own LoRA layers, and the optimizer."""

from .attach import attach_plain
from .files import load, save
from .merge import merge
from .model import TorchSession
from .model import TorchSession as attach
from .ops import TorchOps
from .optimizer import LoraOneAdamW, optimizer

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
