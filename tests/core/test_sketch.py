"""The sketch of a gradient is what its definition says, on every backend, and says honestly what it has not seen."""

import itertools

import numpy as np
import pytest

from lora_one.core.bases import REORTHOGONALIZE_THRESHOLD
from lora_one.core.omega import draw_omega
from lora_one.core.sketch import SketchState, advance, advance_on, finish, probe, start
from lora_one.core.stacking import unstacked
from tests.arrays import (
    SHAPES,
    Arrays,
    assert_same_spectrum,
    best_rank,
    descent,
    spectrum_matrix,
    unlike_gradients,
)

PASSES = [2, 3, 4, 5, 6, 7]


def run_passes(arrays: Arrays, g: np.ndarray, width: int, passes: int, seed: int = 0) -> SketchState:
    """Do what a backend does, with a matrix instead of a model."""
    ops, gradient = arrays.ops, arrays.of(g)
    state = start(ops, arrays.of(draw_omega(seed, "layer", g.shape[1], width)), g.shape[0])
    for _ in range(passes):
        side, factor = probe(ops, state)
        if side == "A":
            gradient_b = ops.matmul(gradient, ops.matrix_transpose(factor))
            state = advance(ops, state, gradient_b)
        else:
            gradient_a = ops.matmul(ops.matrix_transpose(factor), gradient)
            state = advance(ops, state, gradient_a)
    return state


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sketch_of_a_low_rank_gradient_is_exact(arrays, shape, passes):
    """rank(G) <= k: every number of passes must give all of G, also where there is nothing left to probe."""
    g = spectrum_matrix(*shape, np.array([4.0, 2.0, 1.0]))
    spectrum = finish(arrays.ops, run_passes(arrays, g, 8, passes), 3)
    arrays.assert_close(descent(arrays, spectrum), -g, factor=3)
    arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)), factor=3)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sketch_is_the_projection_on_the_block_krylov_space(arrays, shape, passes):
    """Against the definition: G projected on the span of G W, (G G^T) G W, ... (or of W, (G^T G) W, ... after odd)."""
    width, rank = 6, 4
    g = spectrum_matrix(*shape, 1.0 / np.arange(1, min(shape) + 1))
    omega = draw_omega(0, "layer", shape[1], width)
    if passes % 2 == 0:
        blocks = [g @ omega]
        for _ in range(passes // 2 - 1):
            blocks.append(g @ (g.T @ blocks[-1]))
        basis, _ = np.linalg.qr(np.concatenate([b / np.linalg.norm(b, axis=0) for b in blocks], axis=1))
        expected = basis @ (basis.T @ g)
    else:
        blocks = [omega]
        for _ in range(passes // 2):
            blocks.append(g.T @ (g @ blocks[-1]))
        basis, _ = np.linalg.qr(np.concatenate([b / np.linalg.norm(b, axis=0) for b in blocks], axis=1))
        expected = (g @ basis) @ basis.T
    spectrum = finish(arrays.ops, run_passes(arrays, g, width, passes), rank)
    # The naive Krylov basis loses digits to its own condition number, even in float64.
    np.testing.assert_allclose(descent(arrays, spectrum), -best_rank(expected, rank), atol=3e-5)


def test_more_passes_capture_more_and_the_best_is_the_limit(arrays):
    g = spectrum_matrix(80, 60, 1.0 / np.sqrt(np.arange(1, 61)))
    best = np.sum(np.linalg.svd(g, compute_uv=False)[:4] ** 2)
    shares = [np.sum(arrays.numpy(finish(arrays.ops, run_passes(arrays, g, 8, p), 4).s) ** 2) / best for p in PASSES]
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(shares))
    assert shares[0] < 0.95
    assert 0.998 < shares[-1] <= 1 + 1e-6


@pytest.mark.parametrize("passes", PASSES)
def test_best_norm_is_estimated_from_the_convergence_of_the_passes(passes):
    """The energy of the best r directions, estimated without G: too large after 2 and 3 passes, close from 4."""
    arrays = Arrays("numpy", "float64")
    g = spectrum_matrix(80, 60, 1.0 / np.sqrt(np.arange(1, 61)))
    best = np.sum(np.linalg.svd(g, compute_uv=False)[:4] ** 2)
    ratios = []
    for seed in range(40):
        spectrum = finish(arrays.ops, run_passes(arrays, g, 8, passes, seed), 4)
        ratios.append(spectrum.best_norm**2 / best)
    if passes <= 3:
        assert min(ratios) > 1.0
    else:
        assert np.mean(np.abs(np.array(ratios) - 1)) < (0.02 if passes == 4 else 0.001)


FLAT = {
    "linear, 1 to 0.5": np.linspace(1.0, 0.5, 240),
    "linear, 1 to 0": np.linspace(1.0, 0.0, 240),
    "i^-0.1": np.arange(1, 241) ** -0.1,
    "random entries": np.linalg.svd(np.random.default_rng(0).standard_normal((240, 240)), compute_uv=False) / 31.0,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FLAT)
def test_missing_energy_is_estimated_for_flat_spectra_too_after_even_and_after_odd_passes(name, seed):
    """This estimate ends the passes: it must be large while much is missing, and small once nothing is."""
    arrays = Arrays("numpy", "float64")
    g = spectrum_matrix(320, 240, FLAT[name])
    best = np.sum(np.linalg.svd(g, compute_uv=False)[:4] ** 2)
    for passes in range(4, 13):
        spectrum = finish(arrays.ops, run_passes(arrays, g, 20, passes, seed), 4)
        held = np.sum(spectrum.s**2)
        missing, estimate = 1.0 - held / best, 1.0 - held / spectrum.best_norm**2
        if missing > 1e-3:
            assert estimate > 0.45 * missing
        if passes >= 6:
            assert estimate < 3.5 * missing + 1e-3


def test_a_state_is_its_bases_and_what_g_is_in_them(arrays):
    g = spectrum_matrix(60, 50, 1.0 / np.arange(1, 51))
    state = run_passes(arrays, g, 6, 5)
    left = np.concatenate([arrays.numpy(q) for q in (*state.bases.left, state.bases.next_probe)], axis=1)  # (out, 18)
    right = np.concatenate([arrays.numpy(v) for v in state.bases.right], axis=1)  # (in, 18)
    assert [x.shape for x in state.bases.coordinates] == [(6, 6), (12, 6), (12, 6), (18, 6), (18, 6)]
    inside = np.zeros((18, 18))
    for j, x in enumerate(state.bases.coordinates[::2]):
        inside[: 6 * (j + 1), 6 * j : 6 * (j + 1)] = arrays.numpy(x)
    arrays.assert_close(inside, left.T @ g @ right)
    arrays.assert_close(left @ inside, g @ right)  # nothing of the products is lost
    kept = sum(np.size(arrays.numpy(x)) for x in (*state.bases.left, *state.bases.right, state.bases.next_probe))
    assert kept == 3 * 6 * (60 + 50)


@pytest.mark.parametrize("passes", [2, 3, 4])
def test_when_all_directions_are_probed_the_sketch_is_exact_and_says_so(arrays, passes):
    g = spectrum_matrix(12, 7, 1.0 / np.arange(1, 8))
    spectrum = finish(arrays.ops, run_passes(arrays, g, 7, passes), 3)
    arrays.assert_close(descent(arrays, spectrum), -best_rank(g, 3))
    assert arrays.numpy(spectrum.norm_error) == 0
    assert arrays.numpy(spectrum.unseen) == 0
    arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)))


@pytest.mark.parametrize("seed", range(6))
def test_bases_of_all_passes_are_orthonormal_together_where_only_rounding_noise_is_left(arrays, seed):
    """Rank 3 in a sketch of width 8: the second basis consists of noise, and must not repeat the first."""
    g = spectrum_matrix(9, 9, np.array([4.0, 2.0, 1.0]))
    state = run_passes(arrays, g, 8, 4, seed)
    for blocks in (state.bases.left, state.bases.right):
        basis = np.concatenate([arrays.numpy(block) for block in blocks], axis=1)
        arrays.assert_close(basis.T @ basis, np.eye(basis.shape[1]))


NOISY = {"low": np.ones(3), "steep": 0.5 ** np.arange(60), "tail": np.r_[np.ones(10), 1e-8 * np.ones(90)]}


@pytest.mark.parametrize("name", NOISY)
def test_bases_are_orthonormal_where_two_projections_are_made_of_noise_in_a_wide_space(arrays, name):
    state = run_passes(arrays, spectrum_matrix(260, 200, NOISY[name]), 8, 8)
    assert REORTHOGONALIZE_THRESHOLD * sum(block.shape[1] for block in state.bases.right) < 200  # or it would be three
    for blocks in (state.bases.left, state.bases.right):
        basis = np.concatenate([arrays.numpy(block) for block in blocks], axis=1)
        arrays.assert_close(basis.T @ basis, np.eye(basis.shape[1]))


@pytest.mark.parametrize("shape", [(300, 240), (9, 7)])
def test_a_stack_of_gradients_has_the_spectra_of_each(arrays, shape):
    ops, width, gradients = arrays.ops, min(7, *shape), unlike_gradients(shape)
    stack = ops.stack([arrays.of(g) for g in gradients])
    omega = arrays.of(draw_omega(0, "layer", shape[1], width))
    state = start(ops, ops.stack([omega] * len(gradients)), shape[0])
    for _ in range(4):
        state = advance_on(ops, state, stack)
    together = unstacked(finish(ops, state, 3), len(gradients))
    for g, spectrum in zip(gradients, together, strict=True):
        assert_same_spectrum(arrays, spectrum, finish(ops, run_passes(arrays, g, width, 4), 3), g)


def test_leave_one_out_estimates_what_one_column_fewer_would_miss():
    """The mean over many draws is the mean of the truth, and the stated variance is the estimates' own."""
    arrays = Arrays("numpy", "float64")
    g = spectrum_matrix(60, 50, 1.0 / np.arange(1, 51) ** 0.7)
    estimates, variances, truth = [], [], []
    for seed in range(400):
        state = run_passes(arrays, g, 10, 1, seed)
        estimates.append(state.residual * state.scale**2)
        variances.append(state.residual_variance * state.scale**4)
        q, _ = np.linalg.qr(g @ draw_omega(seed, "layer", 50, 10)[:, :9])
        truth.append(np.linalg.norm(g - q @ (q.T @ g)) ** 2)
    assert np.mean(estimates) == pytest.approx(np.mean(truth), rel=0.02)
    assert np.mean(variances) == pytest.approx(np.var(estimates), rel=0.25)


@pytest.mark.parametrize("passes", [2, 3, 4])
def test_norm_and_unseen_are_estimated_a_little_large_and_within_their_error(passes):
    arrays = Arrays("numpy", "float64")
    g = spectrum_matrix(60, 50, 1.0 / np.arange(1, 51) ** 0.7)
    truth = np.linalg.norm(g)
    norms, errors, unseen, missed = [], [], [], []
    for seed in range(200):
        state = run_passes(arrays, g, 10, passes, seed)
        spectrum = finish(arrays.ops, state, 4)
        norms.append(spectrum.norm)
        errors.append(spectrum.norm_error)
        unseen.append(spectrum.unseen)
        everything = finish(arrays.ops, state, min(sum(q.shape[1] for q in state.bases.left), 10 * (passes // 2)))
        missed.append(np.sqrt(max(0.0, truth**2 - np.sum(everything.s**2))))
    assert 1.0 < np.mean(norms) / truth < 1.04
    assert np.std(norms) == pytest.approx(np.mean(errors), rel=0.3)
    assert 0.95 < np.mean(unseen) / np.mean(missed) < 1.25


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("passes", [2, 3, 4])
def test_any_scale_of_the_gradient(arrays, scale, passes):
    g = spectrum_matrix(30, 20, 1.0 / np.arange(1, 21))
    plain = finish(arrays.ops, run_passes(arrays, g, 8, passes), 4)
    scaled = finish(arrays.ops, run_passes(arrays, g * scale, 8, passes), 4)
    arrays.assert_close(descent(arrays, scaled) / scale, descent(arrays, plain))
    arrays.assert_close(arrays.numpy(scaled.norm) / scale, arrays.numpy(plain.norm))
    arrays.assert_close(arrays.numpy(scaled.unseen) / scale, arrays.numpy(plain.unseen), factor=10)


@pytest.mark.parametrize("passes", [2, 3, 4])
def test_a_zero_gradient_has_zero_singular_values_and_norm(arrays, passes):
    spectrum = finish(arrays.ops, run_passes(arrays, np.zeros((12, 10)), 6, passes), 3)
    assert not arrays.numpy(spectrum.s).any()
    assert arrays.numpy(spectrum.norm) == 0
    assert arrays.numpy(spectrum.unseen) == 0
    assert np.isfinite(arrays.numpy(spectrum.u)).all()
    assert np.isfinite(arrays.numpy(spectrum.vt)).all()


def test_signs_make_the_largest_entry_of_each_left_vector_positive(arrays):
    g = spectrum_matrix(30, 20, 1.0 / np.arange(1, 21))
    u = arrays.numpy(finish(arrays.ops, run_passes(arrays, g, 12, 5), 6).u)
    assert (u[np.abs(u).argmax(axis=0), np.arange(6)] > 0).all()


def test_misuse_is_an_error():
    arrays = Arrays("numpy", "float64")
    with pytest.raises(ValueError, match="width must be <= min"):
        start(arrays.ops, np.zeros((10, 6)), 5)
    with pytest.raises(ValueError, match="at least 2 passes, got 1"):
        finish(arrays.ops, run_passes(arrays, np.eye(8), 4, 1), 2)
    with pytest.raises(ValueError, match="rank must be <= 4"):
        finish(arrays.ops, run_passes(arrays, np.eye(8), 4, 2), 5)
