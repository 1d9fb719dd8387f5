"""What a fold tells of the part that it does not hold: the norm and the share of the best energy, against the truth."""

import numpy as np
import pytest

from lora_one.backends.numpy import ops
from lora_one.core.fold import finish_fold, fold, read_both_sides, start_fold
from lora_one.core.omega import draw_omega
from lora_one.core.sides import Products
from tests.arrays import spectrum_matrix

OUT, IN, RANK, WIDTH = 120, 90, 4, 20
I = np.arange(1.0, IN + 1)  # noqa: E741
NOISE = np.linalg.svd(np.random.default_rng(5).standard_normal((OUT, IN)), compute_uv=False)
SPECTRA = {
    "i^-1/2": I**-0.5,
    "i^-1/4": I**-0.25,
    "flat noise": NOISE,
    "4 above flat": np.r_[4.0, 3.5, 3.0, 2.5, 0 * I[4:] + 1],
}


def batches_of(g: np.ndarray, seed: int, count: int) -> list[np.ndarray]:
    """Matrices whose sum is G. Each has noise of its own of 0.3 |G|, which the others take back."""
    rng = np.random.default_rng(seed)
    noises = 0.3 * np.linalg.norm(g) / np.sqrt(g.size) * rng.standard_normal((count, *g.shape))
    return [g / count + noise for noise in noises - np.mean(noises, axis=0)]


def spectra_after(g: np.ndarray, seed: int, count: int, reads: int = 2) -> list:
    """The spectra after a fold of the batches, and after each pass that reads both sides."""
    omega, test = draw_omega(seed, "layer", IN, WIDTH), draw_omega(seed, "layer, test", IN, 8)
    state = start_fold(ops, omega, OUT, test)
    for batch in batches_of(g, seed, count):
        state = fold(ops, state, batch)
    spectra = [finish_fold(ops, state, RANK)]
    for _ in range(reads):
        state = read_both_sides(ops, state, Products(g @ state.v, g.T @ state.u))
        spectra.append(finish_fold(ops, state, RANK))
    return spectra


@pytest.mark.parametrize("name", SPECTRA)
def test_the_norm_is_within_its_error(name):
    """30 draws: the errors in units of the stated error have a spread near 1, and none is beyond 4."""
    ratios, errors = [], []
    for seed in range(30):
        g = spectrum_matrix(OUT, IN, SPECTRA[name], seed=seed)
        for spectrum in spectra_after(g, seed, 4)[1:]:
            ratios.append(spectrum.norm / np.linalg.norm(g))
            errors.append((spectrum.norm - np.linalg.norm(g)) / spectrum.norm_error)
    assert np.max(np.abs(errors)) < 4.0 and 0.6 < np.std(errors) < 1.7
    assert np.max(np.abs(np.array(ratios) - 1.0)) < 0.06


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("count", [1, 4])
def test_the_share_of_the_best_is_told_within_a_factor(name, count):
    """What the factors lack of the best energy. A fold assumes how far a next one would turn it, so it tells too much
    after a single batch; a pass that reads both sides has measured it."""
    for seed in range(20):
        g = spectrum_matrix(OUT, IN, SPECTRA[name], seed=seed)
        best = np.sum(np.linalg.svd(g, compute_uv=False)[:RANK] ** 2)
        for reads, spectrum in enumerate(spectra_after(g, seed, count)):
            lacking = 1.0 - np.sum((spectrum.u.T @ g @ spectrum.vt.T) ** 2) / best
            told = 1.0 - np.sum(spectrum.s**2) / spectrum.best_norm**2
            if reads == 0:
                assert 0.5 * lacking < told < 5.0 * lacking + 0.05
            else:
                assert 0.3 * lacking - 1e-9 < told < 2.0 * lacking + 1e-5


def test_a_gradient_of_low_rank_lacks_nothing_and_says_so():
    g = spectrum_matrix(OUT, IN, 0.7 ** np.arange(10))
    for spectrum in spectra_after(g, 0, 1):
        assert abs(spectrum.norm / np.linalg.norm(g) - 1.0) < 1e-12
        assert np.sum(spectrum.s**2) / spectrum.best_norm**2 > 1.0 - 1e-12
