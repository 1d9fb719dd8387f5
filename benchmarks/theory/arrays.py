"""A backend's arrays in float64, which the theory's rates need: they are followed down to rounding error."""

from typing import Any

import numpy as np

from lora_one.backends import load_backend


class Arrays:
    """`ops` of a backend, and the way in and out of it.

    MLX computes in float64 on the CPU only, which becomes its default device; JAX has to be told before
    (JAX_ENABLE_X64).
    """

    def __init__(self, backend: str = "numpy"):
        self.ops = load_backend(backend).ops
        self._like = _anchor(backend)

    def of(self, x: np.ndarray) -> Any:
        """A NumPy array as this backend's."""
        return self.ops.asarray(np.ascontiguousarray(x, dtype=np.float64), like=self._like)

    def numpy(self, x: Any) -> np.ndarray:
        """This backend's array as NumPy's."""
        return np.asarray(self.ops.to_numpy(x), dtype=np.float64)

    def norm(self, x: Any) -> np.ndarray:
        """The Frobenius norm of matrices (..., m, n): (...)."""
        return np.sqrt(self.numpy(self.ops.sum(self.ops.sum(x * x, axis=-1), axis=-1)))


def _anchor(backend: str) -> Any:
    if backend == "torch":
        import torch

        return torch.zeros((), dtype=torch.float64)
    if backend == "jax":
        import jax.numpy as jnp

        return jnp.zeros((), dtype=jnp.float64)
    if backend == "mlx":
        import mlx.core as mx

        mx.set_default_device(mx.cpu)
        return mx.zeros((), dtype=mx.float64)
    return np.zeros(())
