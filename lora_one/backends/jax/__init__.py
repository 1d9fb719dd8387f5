"""JAX: arrays, Flax models, and the optimizer."""

from .files import load, merge, save, unload
from .layers import register_layer
from .llama_files import load_llama
from .model import JaxSession
from .model import JaxSession as attach
from .ops import JaxOps
from .optimizer import lora_adamw, optimizer, scale_by_lora_preconditioner
from .plain import attach_plain
from .trees import LinenModel, PytreeModel

ops = JaxOps()

__all__ = [
    "JaxOps",
    "JaxSession",
    "LinenModel",
    "PytreeModel",
    "attach",
    "attach_plain",
    "load",
    "load_llama",
    "lora_adamw",
    "merge",
    "ops",
    "optimizer",
    "register_layer",
    "save",
    "scale_by_lora_preconditioner",
    "unload",
]
