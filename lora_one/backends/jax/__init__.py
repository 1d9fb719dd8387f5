"""JAX: arrays, Flax models, and the optimizer."""

from .files import load, merge, save, unload
from .files import one_writer as one_writer
from .llama.files import load_llama
from .nnx.binding import attach_plain
from .nnx.layers import register_layer
from .ops import JaxOps
from .optimizer import lora_adamw, optimizer, scale_by_lora_preconditioner
from .session import JaxSession, open_session
from .trees.models import LinenModel, PytreeModel

ops = JaxOps()

__all__ = [
    "JaxOps",
    "JaxSession",
    "LinenModel",
    "PytreeModel",
    "attach_plain",
    "load",
    "load_llama",
    "lora_adamw",
    "merge",
    "open_session",
    "ops",
    "optimizer",
    "register_layer",
    "save",
    "scale_by_lora_preconditioner",
    "unload",
]
