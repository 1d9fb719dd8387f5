"""NumPy: arrays only, the reference. It has no models of its own."""

from .ops import NumpyOps

ops = NumpyOps()

__all__ = ["NumpyOps", "ops"]
