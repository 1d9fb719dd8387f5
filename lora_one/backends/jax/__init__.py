"""JAX: arrays, Flax models, and the optimizer."""

from .ops import JaxOps

ops = JaxOps()

__all__ = ["JaxOps", "ops"]
