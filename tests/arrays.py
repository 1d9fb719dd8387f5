"""The array backends and the matrices that tests of `core` run on, and the tolerances of their results."""

from typing import Any

import numpy as np
import pytest

from lora_one.backends import load_backend
from lora_one.core.spectrum import Spectrum

# The largest error of equal results, relative to the largest entry, by the dtype of the computation.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


class Arrays:
    """A backend's `ops` in one dtype, with conversions from and to NumPy."""

    def __init__(self, backend: str, dtype: str):
        self.ops = load_backend(backend).ops
        self.dtype = dtype
        self.tolerance = TOLERANCE[dtype]
        self.like = _anchor(backend, dtype)

    def of(self, x: np.ndarray) -> Any:
        """Convert a NumPy array to this backend."""
        return self.ops.asarray(np.asarray(x, order="C"), like=self.like)

    def numpy(self, x: Any) -> np.ndarray:
        """Convert an array of this backend to NumPy, in float64."""
        return np.asarray(x if isinstance(x, (np.ndarray, np.generic)) else self.ops.to_numpy(x), dtype=np.float64)

    def assert_close(self, got: Any, expected: np.ndarray, factor: float = 1.0) -> None:
        """Check equality up to `factor` times the dtype's tolerance, relative to the largest expected entry."""
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

        mx.set_default_device(mx.cpu)  # the only device with float64
        return mx.zeros((), dtype=getattr(mx, dtype))
    if backend == "jax":
        import jax.numpy as jnp

        return jnp.zeros((), dtype=dtype)  # float64 needs x64: tests/conftest.py turns it on, test by test
    return np.zeros((), dtype=dtype)


SHAPES = [(40, 40), (60, 24), (24, 60), (9, 9)]

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
    """A random matrix with the given singular values, (rows, columns), float64."""
    rng = np.random.default_rng(seed)
    p = len(singular_values)
    u, _ = np.linalg.qr(rng.standard_normal((rows, p)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, p)))
    return (u * singular_values) @ v.T


def best_rank(g: np.ndarray, rank: int) -> np.ndarray:
    """The best rank-r approximation, by LAPACK."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def unlike_gradients(shape: tuple[int, int]) -> list[np.ndarray]:
    """Gradients of one shape with spectra that have little in common: slow, steep and tiny, rank 2, zero."""
    spectra = [0.8 ** np.arange(7), 1e-3 * 0.5 ** np.arange(5), np.ones(2), np.zeros(1)]
    return [spectrum_matrix(*shape, s, seed=seed) for seed, s in enumerate(spectra)]


def descent(arrays: Arrays, spectrum: Spectrum) -> np.ndarray:
    """The descent direction that a spectrum describes: -G, as far as its triplets hold it."""
    u, s, vt = (arrays.numpy(x) for x in spectrum[:3])
    return (u * s) @ vt


def assert_same_spectrum(arrays: Arrays, got: Spectrum, expected: Spectrum, g: np.ndarray) -> None:
    """Check two spectra of G for equality. Norms get a wide tolerance: the unseen part of a G of low rank is the square
    root of a rounding error."""
    scale = np.linalg.norm(g, 2) or 1.0
    assert np.abs(descent(arrays, got) - descent(arrays, expected)).max() <= arrays.tolerance * scale
    for x, y in zip(got[3:], expected[3:], strict=True):
        assert abs(float(arrays.numpy(x)) - float(arrays.numpy(y))) <= 3e-3 * scale
