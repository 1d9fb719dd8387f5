"""The array backends that a test of `core` runs on, the matrices it runs with, and how exact it may be asked to be."""

from typing import Any

import numpy as np
import pytest

from lora_one.backends import load_backend

# What "equal" means, relative to the largest entry, by the dtype that the computation ran in.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


class Arrays:
    """A backend's `ops` in one dtype, with ways in and out of it."""

    def __init__(self, backend: str, dtype: str):
        self.ops = load_backend(backend).ops
        self.dtype = dtype
        self.tolerance = TOLERANCE[dtype]
        self.like = _anchor(backend, dtype)

    def of(self, x: np.ndarray) -> Any:
        """A NumPy array in this backend."""
        return self.ops.asarray(np.asarray(x, order="C"), like=self.like)

    def numpy(self, x: Any) -> np.ndarray:
        """A float64 NumPy array of this backend's."""
        return np.asarray(x if isinstance(x, (np.ndarray, np.generic)) else self.ops.to_numpy(x), dtype=np.float64)

    def assert_close(self, got: Any, expected: np.ndarray, factor: float = 1.0) -> None:
        """Equal to `factor` times this dtype's tolerance, relative to the largest entry expected."""
        got = self.numpy(got)
        assert got.shape == expected.shape
        scale = float(np.max(np.abs(expected), initial=0.0)) or 1.0
        error = float(np.max(np.abs(got - expected), initial=0.0)) / scale
        assert error <= factor * self.tolerance, f"relative error {error:.2e}, allowed {factor * self.tolerance:.0e}"


def _anchor(backend: str, dtype: str) -> Any:
    if backend == "torch":
        import torch

        return torch.zeros((), dtype=getattr(torch, dtype))
    if backend == "mlx":
        import mlx.core as mx

        mx.set_default_device(mx.cpu)  # float64 exists there only
        return mx.zeros((), dtype=getattr(mx, dtype))
    if backend == "jax":
        import jax.numpy as jnp

        return jnp.zeros((), dtype=dtype)  # float64 needs x64: tests/conftest.py turns it on, test by test
    return np.zeros((), dtype=dtype)


ARRAYS = [
    pytest.param(("numpy", "float64"), id="numpy-float64"),
    pytest.param(("numpy", "float32"), id="numpy-float32"),
    pytest.param(("torch", "float64"), id="torch-float64"),
    pytest.param(("torch", "float32"), id="torch-float32"),
    pytest.param(("mlx", "float64"), id="mlx-float64"),
    pytest.param(("mlx", "float32"), id="mlx-float32"),
    pytest.param(("jax", "float64"), id="jax-float64"),
    pytest.param(("jax", "float32"), id="jax-float32"),
]


def spectrum_matrix(rows: int, columns: int, singular_values: np.ndarray, seed: int = 0) -> np.ndarray:
    """A random matrix with the singular values given, (rows, columns), float64."""
    rng = np.random.default_rng(seed)
    p = len(singular_values)
    u, _ = np.linalg.qr(rng.standard_normal((rows, p)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, p)))
    return (u * singular_values) @ v.T


def best_rank(g: np.ndarray, rank: int) -> np.ndarray:
    """The best rank-r approximation, by LAPACK."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]
