"""Tests of MLX's operations beyond those of `core`, which run on MLX too."""

import mlx.core as mx
import numpy as np
import pytest

from lora_one.backends.mlx import ops


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (3, 7, 2)])
def test_svd_is_thin_and_descending(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    u, s, vt = (ops.to_numpy(part) for part in ops.svd(mx.array(x, dtype=mx.float64)))
    p = min(shape[-2:])
    assert u.shape == (*shape[:-1], p)
    assert vt.shape == (*shape[:-2], p, shape[-1])
    np.testing.assert_allclose(s, np.linalg.svd(x, compute_uv=False), rtol=1e-12)
    np.testing.assert_allclose((u * s[..., None, :]) @ vt, x, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("r", [1, 8, 64])
def test_cholesky_solve_tells_definite_from_indefinite(dtype, r):
    """Half of the batch has one negative eigenvalue, of many sizes. Ill-conditioned definite matrices are solved."""
    rng = np.random.default_rng(r)
    eps = np.finfo(dtype).eps
    for smallest in (0.1, 1e-3, 50 * r * eps):
        q, _ = np.linalg.qr(rng.standard_normal((6, r, r)))
        eigenvalues = np.geomspace(1.0, smallest, r) * np.ones((6, 1))
        eigenvalues[::2, -1] *= -1
        gram = mx.array((q * eigenvalues[:, None, :]) @ q.swapaxes(-1, -2), dtype=getattr(mx, dtype))
        got = ops.to_numpy(ops.cholesky_solve(gram, ops.eye(r, like=gram))).astype(np.float64)
        assert np.isnan(got[::2]).all()
        residual = ops.to_numpy(gram).astype(np.float64)[1::2] @ got[1::2] - np.eye(r)
        assert np.abs(residual).max() < 100 * r * eps / smallest


def test_cholesky_solve_does_not_let_nan_or_zero_matrices_raise():
    gram = mx.array(np.stack([np.full((3, 3), np.nan), np.zeros((3, 3)), 4 * np.eye(3)]), dtype=mx.float32)
    got = ops.to_numpy(ops.cholesky_solve(gram, mx.eye(3)))
    assert np.isnan(got[:2]).all()
    np.testing.assert_array_equal(got[2], np.eye(3) / 4)


def test_asarray_copies_transposed_arrays_right_and_keeps_float64():
    x = np.arange(6.0).reshape(2, 3) + 1e-12
    got = ops.asarray(x.T, like=mx.zeros((), dtype=mx.float64))
    np.testing.assert_array_equal(ops.to_numpy(got), x.T)
    assert ops.asarray(np.float64(2.0), like=mx.zeros(())).shape == ()
    assert ops.to_numpy(mx.array([1.5], dtype=mx.bfloat16)).dtype == np.float32
