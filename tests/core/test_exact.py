"""The exact spectrum is that of LAPACK; of a large gradient it holds as much as it promises, alone and together."""

from collections import Counter

import numpy as np
import pytest

from lora_one.core import krylov
from lora_one.core.exact import ENOUGH, exact_spectra, exact_spectrum
from lora_one.core.gradient import times, transposed_times
from lora_one.report import share_of_best
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


def test_exact_of_a_large_gradient_converges_to_lapacks_triplets(arrays, monkeypatch):
    g = large(0.7 ** np.arange(60))
    monkeypatch.setattr("lora_one.core.exact.thin_svd", lambda *_: pytest.fail("a dense SVD"))
    spectrum = exact_spectrum(arrays.ops, arrays.of(g), 4)
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


INDEX = np.arange(1.0, 321.0)
SPECTRA = {
    "1 / i": 1.0 / INDEX,
    "i^-1/2": INDEX**-0.5,
    "i^-1/4": INDEX**-0.25,
    "0.9^i": 0.9**INDEX,
    "to zero": np.linspace(1.0, 0.0, 320),
    "4 above a flat rest": np.r_[np.full(4, 3.0), np.linspace(1.0, 0.5, 316)],
    "1 far above a flat rest": np.r_[1.0, 0.01 * np.linspace(1.0, 0.9, 319)],
    "all equal": np.ones(320),
    "equal by 5": np.repeat(0.7 ** np.arange(64.0), 5),
    "equal by 16": np.repeat(0.8 ** np.arange(20.0), 16),
    "40 close ones above a plateau": np.r_[np.linspace(1.0, 0.99, 40), np.linspace(0.9, 0.7, 280)],
    "2, then 100 close ones": np.r_[3.0, 2.0, np.linspace(1.0, 0.999, 100), np.linspace(0.5, 0.4, 218)],
    "rank 5": np.ones(5),
    "rank 40": np.linspace(1.0, 0.5, 40),
}


@pytest.fixture
def products(monkeypatch) -> Counter:
    """The number of products with each G, by its id."""
    counts = Counter()

    def counting(product):
        return lambda ops, g, x: counts.update([id(g)]) or product(ops, g, x)

    monkeypatch.setattr(krylov, "times", counting(times))
    monkeypatch.setattr(krylov, "transposed_times", counting(transposed_times))
    return counts


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SPECTRA)
def test_products_end_when_enough_of_the_best_energy_is_held(name, dtype, products):
    """The triplets hold what they say, and `share_of_best` is never above the truth, but for rounding."""
    arrays, g = Arrays("numpy", dtype), spectrum_matrix(400, 320, SPECTRA[name])
    gradient = arrays.of(g)
    spectrum = exact_spectrum(arrays.ops, gradient, 8)
    u, s, vt = (arrays.numpy(x) for x in spectrum[:3])
    best = np.sum(np.sort(SPECTRA[name])[::-1][:8] ** 2)
    held = np.sum((u.T @ -g @ vt.T).diagonal() ** 2) / best
    assert held == pytest.approx(np.sum(s**2) / best, rel=1e-5)
    reported = share_of_best(spectrum._replace(s=s, best_norm=arrays.numpy(spectrum.best_norm)))
    assert held >= ENOUGH and held >= reported - 1e-5
    assert products[id(gradient)] <= 32 and (reported >= ENOUGH or products[id(gradient)] == 32)


def test_a_flat_spectrum_ends_at_the_last_check_and_its_report_says_so(products):
    values = np.linspace(1.0, 0.5, 1600)
    g = np.diag(values)
    spectrum = exact_spectrum(Arrays("numpy", "float64").ops, g, 2)
    held = np.sum(spectrum.s**2) / np.sum(values[:2] ** 2)
    assert products[id(g)] == 32
    assert 0.98 < share_of_best(spectrum) < ENOUGH and share_of_best(spectrum) < held < 1.0


def test_gradients_that_go_together_stop_each_where_it_is_done(arrays, products):
    """A steep spectrum, a slower one, a flat one, and another steep one after it."""
    flat = 1.0 - 1e-3 * np.arange(320)
    matrices = [large(decay) for decay in (0.1 ** np.arange(60), INDEX**-0.3, flat, 0.11 ** np.arange(60))]
    gradients = [arrays.of(g) for g in matrices]
    together = exact_spectra(arrays.ops, gradients, 4)
    assert [products[id(g)] for g in gradients] == [8, 16, 32, 8]
    for g, spectrum in zip(matrices, together, strict=True):
        u, s, vt = (arrays.numpy(x) for x in spectrum[:3])
        arrays.assert_close(u.T @ u, np.eye(4))
        arrays.assert_close((u.T @ -g @ vt.T), np.diag(s))
        assert np.sum(s**2) >= ENOUGH * np.sum(np.linalg.svd(g, compute_uv=False)[:4] ** 2)
        arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)))


def test_a_large_zero_gradient(arrays):
    spectrum = exact_spectrum(arrays.ops, arrays.of(np.zeros((400, 320))), 4)
    assert not arrays.numpy(spectrum.s).any()
    assert arrays.numpy(spectrum.norm) == 0
    assert np.isfinite(arrays.numpy(spectrum.u)).all()
