"""The NumPy backend: arrays only, since NumPy has no models. It is the reference for all others."""

from .ops import NumpyOps

ops = NumpyOps()

__all__ = ["NumpyOps", "ops"]
