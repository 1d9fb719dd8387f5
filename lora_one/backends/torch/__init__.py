"""The PyTorch backend: array operations, LoRA by PEFT's own layers, the optimizer, and adapters on disk."""

from .attachment.attach import attach_plain
from .files.folder import load, save
from .files.folder import one_writer as one_writer
from .lora_adamw import LoraOneAdamW
from .merge import merge
from .ops import TorchOps
from .optimizer import optimizer
from .session import TorchSession, open_session

ops = TorchOps()

__all__ = [
    "LoraOneAdamW",
    "TorchOps",
    "TorchSession",
    "attach_plain",
    "load",
    "merge",
    "open_session",
    "ops",
    "optimizer",
    "save",
]
