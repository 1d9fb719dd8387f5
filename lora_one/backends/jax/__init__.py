"""JAX: arrays, Flax models, and the optimizer."""

from .layers import register_layer
from .model import JaxSession
from .model import JaxSession as attach
from .ops import JaxOps

ops = JaxOps()

__all__ = ["JaxOps", "JaxSession", "attach", "ops", "register_layer"]
