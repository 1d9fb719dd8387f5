"""The exact spectrum of a gradient is that of LAPACK, for small and large gradients, alone and together."""

from collections import Counter

import numpy as np
import pytest

from lora_one.core import krylov
from lora_one.core.exact import exact_spectra, exact_spectrum
from lora_one.core.gradient import times
from lora_one.core.krylov import leading_triplets
from lora_one.core.omega import draw_omega
from tests.arrays import (
    SHAPES,
    Arrays,
    assert_same_spectrum,
    best_rank,
    descent,
    spectrum_matrix,
    unlike_gradients,
)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_the_truncated_svd_of_minus_g(arrays, shape):
    g = spectrum_matrix(*shape, 0.7 ** np.arange(min(shape)))
    spectrum = exact_spectrum(arrays.ops, arrays.of(g), 5)
    arrays.assert_close(descent(arrays, spectrum), -best_rank(g, 5))
    arrays.assert_close(spectrum.s, np.linalg.svd(g, compute_uv=False)[:5])
    arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)))
    assert arrays.numpy(spectrum.norm_error) == 0
    assert arrays.numpy(spectrum.unseen) == 0


@pytest.mark.parametrize("shape", [(300, 240), (9, 7)])  # one to iterate on, one to decompose whole
def test_a_stack_of_gradients_has_the_spectra_of_each(arrays, shape):
    gradients = unlike_gradients(shape)
    together = exact_spectra(arrays.ops, [arrays.of(g) for g in gradients], 3)
    for g, spectrum in zip(gradients, together, strict=True):
        assert_same_spectrum(arrays, spectrum, exact_spectrum(arrays.ops, arrays.of(g), 3), g)


def test_signs_make_the_largest_entry_of_each_left_vector_positive(arrays):
    g = spectrum_matrix(30, 20, 1.0 / np.arange(1, 21))
    u = arrays.numpy(exact_spectrum(arrays.ops, arrays.of(g), 6).u)
    assert (u[np.abs(u).argmax(axis=0), np.arange(6)] > 0).all()


def test_orthogonal_maps_commute_with_exact_svd(arrays):
    g = spectrum_matrix(30, 20, 0.6 ** np.arange(20))
    rng = np.random.default_rng(1)
    p, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    q, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    plain = descent(arrays, exact_spectrum(arrays.ops, arrays.of(g), 5))
    mapped = descent(arrays, exact_spectrum(arrays.ops, arrays.of(p @ g @ q.T), 5))
    arrays.assert_close(mapped, p @ plain @ q.T)


def large(decay: np.ndarray) -> np.ndarray:
    return spectrum_matrix(400, 320, decay)


def test_exact_of_a_large_gradient_converges_to_lapacks_triplets(arrays):
    g = large(0.7 ** np.arange(60))
    gradient = arrays.of(g)
    omega = arrays.of(draw_omega(0, "layer", 320, 20))
    assert leading_triplets(arrays.ops, [gradient], omega, 4, limit=80) != [None]  # not the dense SVD
    spectrum = exact_spectrum(arrays.ops, gradient, 4)
    arrays.assert_close(descent(arrays, spectrum), -best_rank(g, 4))
    arrays.assert_close(spectrum.s, np.linalg.svd(g, compute_uv=False)[:4])
    arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)))
    arrays.assert_close(spectrum.best_norm, np.asarray(np.linalg.norm(0.7 ** np.arange(4))))
    assert arrays.numpy(spectrum.norm_error) == arrays.numpy(spectrum.unseen) == 0


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float32", 1e-20), ("float32", 1e20), ("float64", 1e-200), ("float64", 1e200)]
)
def test_exact_of_a_large_gradient_at_any_scale(dtype, scale):
    arrays = Arrays("torch", dtype)
    g = large(0.7 ** np.arange(60))
    spectrum = exact_spectrum(arrays.ops, arrays.of(g * scale), 4)
    arrays.assert_close(descent(arrays, spectrum) / scale, -best_rank(g, 4))
    arrays.assert_close(arrays.numpy(spectrum.norm) / scale, np.asarray(np.linalg.norm(g)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_of_a_large_flat_gradient_falls_back_to_the_dense_svd(dtype):
    arrays = Arrays("numpy", dtype)
    decay = np.r_[1.0, 0.999, 0.998, 0.5 * np.ones(317)]
    decay[3:] -= 1e-4 * np.arange(317)
    g = large(decay)
    omega = arrays.of(draw_omega(0, "layer", 320, 20))
    assert leading_triplets(arrays.ops, [arrays.of(g)], omega, 5, limit=80) == [None]
    spectrum = exact_spectrum(arrays.ops, arrays.of(g), 5)
    arrays.assert_close(spectrum.s, decay[:5])
    arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(decay)))


def test_gradients_that_go_together_stop_each_where_it_is_done(arrays, monkeypatch):
    """A steep spectrum, a slower one, a flat one that needs the dense SVD, and another steep one after it."""
    flat = 1.0 - 1e-3 * np.arange(320)
    matrices = [large(decay) for decay in (0.1 ** np.arange(60), 0.77 ** np.arange(60), flat, 0.11 ** np.arange(60))]
    products = Counter()

    def counted(ops, g, x):
        products[id(g)] += 1
        return times(ops, g, x)

    monkeypatch.setattr(krylov, "times", counted)
    gradients = [arrays.of(g) for g in matrices]
    together = exact_spectra(arrays.ops, gradients, 4)
    steep, slower, whole, steep_again = (products[id(g)] for g in gradients)
    assert steep == steep_again < slower < whole
    for g, spectrum in zip(matrices, together, strict=True):
        arrays.assert_close(arrays.numpy(spectrum.u).T @ arrays.numpy(spectrum.u), np.eye(4))
        if g is not matrices[2]:  # the flat one, whose fourth and fifth directions rounding mixes
            arrays.assert_close(descent(arrays, spectrum), -best_rank(g, 4))
        arrays.assert_close(spectrum.s, np.linalg.svd(g, compute_uv=False)[:4])
        arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)))


def test_a_large_zero_gradient(arrays):
    spectrum = exact_spectrum(arrays.ops, arrays.of(np.zeros((400, 320))), 4)
    assert not arrays.numpy(spectrum.s).any()
    assert arrays.numpy(spectrum.norm) == 0
    assert np.isfinite(arrays.numpy(spectrum.u)).all()
