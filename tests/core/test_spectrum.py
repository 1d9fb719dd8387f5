import itertools
from collections import Counter

import numpy as np
import pytest

from lora_one.core import krylov
from lora_one.core.exact import exact_spectra, exact_spectrum
from lora_one.core.gradient import times
from lora_one.core.krylov import leading_triplets
from lora_one.core.omega import draw_omega
from lora_one.core.sketch import REORTHOGONALIZE_THRESHOLD, SketchState, advance, advance_on, finish, probe, start
from lora_one.core.stacking import unstacked
from tests.arrays import ARRAYS, Arrays, best_rank, spectrum_matrix

SHAPES = [(40, 40), (60, 24), (24, 60), (9, 9)]
PASSES = [2, 3, 4, 5, 6, 7]


@pytest.fixture(params=ARRAYS)
def arrays(request):
    return Arrays(*request.param)


def run_passes(arrays: Arrays, g: np.ndarray, width: int, passes: int, seed: int = 0) -> SketchState:
    """What a backend does, with a matrix in the place of the model."""
    ops, gradient = arrays.ops, arrays.of(g)
    state = start(ops, arrays.of(draw_omega(seed, "layer", g.shape[1], width)), g.shape[0])
    for _ in range(passes):
        side, factor = probe(ops, state)
        if side == "A":
            wanted = ops.matmul(gradient, ops.matrix_transpose(factor))
        else:
            wanted = ops.matmul(ops.matrix_transpose(factor), gradient)
        state = advance(ops, state, wanted)
    return state


def descent(arrays: Arrays, spectrum) -> np.ndarray:
    u, s, vt = (arrays.numpy(x) for x in spectrum[:3])
    return (u * s) @ vt


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_the_truncated_svd_of_minus_g(arrays, shape):
    g = spectrum_matrix(*shape, 0.7 ** np.arange(min(shape)))
    spectrum = exact_spectrum(arrays.ops, arrays.of(g), 5)
    arrays.assert_close(descent(arrays, spectrum), -best_rank(g, 5))
    arrays.assert_close(spectrum.s, np.linalg.svd(g, compute_uv=False)[:5])
    arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)))
    assert arrays.numpy(spectrum.norm_error) == 0
    assert arrays.numpy(spectrum.unseen) == 0


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
def test_best_norm_is_told_from_the_convergence_of_the_passes(passes):
    """The energy of the best r directions, estimated without G: too large after 2 and 3 passes, close from 4."""
    arrays = Arrays("numpy", "float64")
    g = spectrum_matrix(80, 60, 1.0 / np.sqrt(np.arange(1, 61)))
    best = np.sum(np.linalg.svd(g, compute_uv=False)[:4] ** 2)
    told = []
    for seed in range(40):
        spectrum = finish(arrays.ops, run_passes(arrays, g, 8, passes, seed), 4)
        told.append(spectrum.best_norm**2 / best)
    if passes <= 3:
        assert min(told) > 1.0
    else:
        assert np.mean(np.abs(np.array(told) - 1)) < (0.02 if passes == 4 else 0.001)


FLAT = {
    "linear, 1 to 0.5": np.linspace(1.0, 0.5, 240),
    "linear, 1 to 0": np.linspace(1.0, 0.0, 240),
    "i^-0.1": np.arange(1, 241) ** -0.1,
    "random entries": np.linalg.svd(np.random.default_rng(0).standard_normal((240, 240)), compute_uv=False) / 31.0,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FLAT)
def test_what_is_missing_is_told_of_flat_spectra_too_after_even_and_after_odd_passes(name, seed):
    """Which ends the passes: what is missing must be told before it is gone, and not be told when it is."""
    arrays = Arrays("numpy", "float64")
    g = spectrum_matrix(320, 240, FLAT[name])
    best = np.sum(np.linalg.svd(g, compute_uv=False)[:4] ** 2)
    for passes in range(4, 13):
        spectrum = finish(arrays.ops, run_passes(arrays, g, 20, passes, seed), 4)
        held = np.sum(spectrum.s**2)
        missing, told = 1.0 - held / best, 1.0 - held / spectrum.best_norm**2
        if missing > 1e-3:
            assert told > 0.45 * missing
        if passes >= 6:
            assert told < 3.5 * missing + 1e-3


def test_a_state_is_its_bases_and_what_g_is_in_them(arrays):
    g = spectrum_matrix(60, 50, 1.0 / np.arange(1, 51))
    state = run_passes(arrays, g, 6, 5)
    left = np.concatenate([arrays.numpy(q) for q in (*state.left, state.next_probe)], axis=1)  # (out, 18)
    right = np.concatenate([arrays.numpy(v) for v in state.right], axis=1)  # (in, 18)
    assert [x.shape for x in state.coordinates] == [(6, 6), (12, 6), (12, 6), (18, 6), (18, 6)]
    inside = np.zeros((18, 18))
    for j, x in enumerate(state.coordinates[::2]):
        inside[: 6 * (j + 1), 6 * j : 6 * (j + 1)] = arrays.numpy(x)
    arrays.assert_close(inside, left.T @ g @ right)
    arrays.assert_close(left @ inside, g @ right)  # nothing of the products is lost
    kept = sum(np.size(arrays.numpy(x)) for x in (*state.left, *state.right, state.next_probe))
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
    for blocks in (state.left, state.right):
        basis = np.concatenate([arrays.numpy(block) for block in blocks], axis=1)
        arrays.assert_close(basis.T @ basis, np.eye(basis.shape[1]))


NOISY = {"low": np.ones(3), "steep": 0.5 ** np.arange(60), "tail": np.r_[np.ones(10), 1e-8 * np.ones(90)]}


@pytest.mark.parametrize("name", NOISY)
def test_bases_are_orthonormal_where_two_projections_are_made_of_noise_in_a_wide_space(arrays, name):
    state = run_passes(arrays, spectrum_matrix(260, 200, NOISY[name]), 8, 8)
    assert REORTHOGONALIZE_THRESHOLD * sum(block.shape[1] for block in state.right) < 200  # or it would be three
    for blocks in (state.left, state.right):
        basis = np.concatenate([arrays.numpy(block) for block in blocks], axis=1)
        arrays.assert_close(basis.T @ basis, np.eye(basis.shape[1]))


@pytest.mark.parametrize("shape", [(300, 240), (9, 7)])  # one to iterate on, one to decompose whole
def test_a_stack_of_gradients_has_the_spectra_of_each(arrays, shape):
    spectra = [0.8 ** np.arange(7), 1e-3 * 0.5 ** np.arange(5), np.ones(2), np.zeros(1)]
    each = [spectrum_matrix(*shape, s, seed=seed) for seed, s in enumerate(spectra)]
    ops, width = arrays.ops, min(7, *shape)
    states = [run_passes(arrays, g, width, 4) for g in each]
    gradient = ops.stack([arrays.of(g) for g in each])
    state = start(ops, ops.stack([arrays.of(draw_omega(0, "layer", shape[1], width))] * len(each)), shape[0])
    for _ in range(4):
        state = advance_on(ops, state, gradient)
    pairs = [
        (unstacked(finish(ops, state, 3), len(each)), [finish(ops, its, 3) for its in states]),
        (exact_spectra(ops, [arrays.of(g) for g in each], 3), [exact_spectrum(ops, arrays.of(g), 3) for g in each]),
    ]
    for together, alone in pairs:
        for index, (got, want) in enumerate(zip(together, alone, strict=True)):
            scale = np.linalg.norm(each[index], 2) or 1.0
            assert np.abs(descent(arrays, got) - descent(arrays, want)).max() <= arrays.tolerance * scale
            for x, y in zip(got[3:], want[3:], strict=True):  # what is left of a G of low rank is the root of rounding
                assert abs(float(arrays.numpy(x)) - float(arrays.numpy(y))) <= 3e-3 * scale


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
        everything = finish(arrays.ops, state, min(sum(q.shape[1] for q in state.left), 10 * (passes // 2)))
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
    for spectrum in (
        exact_spectrum(arrays.ops, arrays.of(g), 6),
        finish(arrays.ops, run_passes(arrays, g, 12, 5), 6),
    ):
        u = arrays.numpy(spectrum.u)
        assert (u[np.abs(u).argmax(axis=0), np.arange(6)] > 0).all()


def test_orthogonal_maps_commute_with_exact_svd(arrays):
    g = spectrum_matrix(30, 20, 0.6 ** np.arange(20))
    rng = np.random.default_rng(1)
    p, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    q, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    plain = descent(arrays, exact_spectrum(arrays.ops, arrays.of(g), 5))
    mapped = descent(arrays, exact_spectrum(arrays.ops, arrays.of(p @ g @ q.T), 5))
    arrays.assert_close(mapped, p @ plain @ q.T)


def test_omega_depends_on_seed_and_layer_and_on_nothing_else():
    omega = draw_omega(3, "model.layers.0.q_proj", 50, 7)
    assert omega.shape == (50, 7)
    assert omega.dtype == np.float64
    np.testing.assert_array_equal(omega, draw_omega(3, "model.layers.0.q_proj", 50, 7))
    # A literal, so that no later version of this file or of NumPy may change what a seed means.
    np.testing.assert_allclose(omega[0, :3], OMEGA_HEAD, rtol=1e-12)
    for other in (draw_omega(4, "model.layers.0.q_proj", 50, 7), draw_omega(3, "model.layers.1.q_proj", 50, 7)):
        assert abs(np.corrcoef(omega.ravel(), other.ravel())[0, 1]) < 0.2


OMEGA_HEAD = [0.33048847543124665, 0.49713719448392574, 1.3655681364181893]


def test_misuse_is_an_error():
    arrays = Arrays("numpy", "float64")
    with pytest.raises(ValueError, match="width must be <= min"):
        start(arrays.ops, np.zeros((10, 6)), 5)
    with pytest.raises(ValueError, match="at least 2 passes, got 1"):
        finish(arrays.ops, run_passes(arrays, np.eye(8), 4, 1), 2)
    with pytest.raises(ValueError, match="rank must be <= 4"):
        finish(arrays.ops, run_passes(arrays, np.eye(8), 4, 2), 5)


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
    """A steep one, a slower one, a flat one that takes the dense SVD, and a steep one after it."""
    flat = 1.0 - 1e-3 * np.arange(320)
    each = [large(decay) for decay in (0.1 ** np.arange(60), 0.77 ** np.arange(60), flat, 0.11 ** np.arange(60))]
    products = Counter()

    def counted(ops, g, x):
        products[id(g)] += 1
        return times(ops, g, x)

    monkeypatch.setattr(krylov, "times", counted)
    gradients = [arrays.of(g) for g in each]
    together = exact_spectra(arrays.ops, gradients, 4)
    steep, slower, whole, steep_again = (products[id(g)] for g in gradients)
    assert steep == steep_again < slower < whole
    for g, spectrum in zip(each, together, strict=True):
        arrays.assert_close(arrays.numpy(spectrum.u).T @ arrays.numpy(spectrum.u), np.eye(4))
        if g is not each[2]:  # whose fourth and fifth directions rounding mixes
            arrays.assert_close(descent(arrays, spectrum), -best_rank(g, 4))
        arrays.assert_close(spectrum.s, np.linalg.svd(g, compute_uv=False)[:4])
        arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)))


def test_a_large_zero_gradient(arrays):
    spectrum = exact_spectrum(arrays.ops, arrays.of(np.zeros((400, 320))), 4)
    assert not arrays.numpy(spectrum.s).any()
    assert arrays.numpy(spectrum.norm) == 0
    assert np.isfinite(arrays.numpy(spectrum.u)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_triplets_where_a_block_is_partly_rounding_noise(dtype):
    """Rank 30 in blocks of 20: the second has 10 true directions, and 10 that must not repeat what is known already.
    Most rows and columns are zero, so that the noise lies where the known directions do."""
    arrays = Arrays("numpy", dtype)
    decay = 0.95 ** np.arange(30)
    g = np.zeros((400, 320))
    g[::10, ::8] = spectrum_matrix(40, 40, decay)
    omega = arrays.of(draw_omega(0, "layer", 320, 20))
    [found] = leading_triplets(arrays.ops, [arrays.of(g)], omega, 12, limit=80)
    assert found is not None
    u, s, vt = (np.asarray(x, dtype=np.float64) for x in found)
    arrays.assert_close(s, decay[:12])
    arrays.assert_close((u * s) @ vt, best_rank(g, 12))


def test_triplets_of_a_matrix_with_fewer_directions_than_asked_for():
    arrays = Arrays("numpy", "float64")
    g = spectrum_matrix(400, 320, np.array([3.0, 2.0, 1.0]))
    [(u, s, vt)] = leading_triplets(arrays.ops, [g], draw_omega(0, "layer", 320, 16), 8, limit=80)
    arrays.assert_close(s, np.r_[3.0, 2.0, 1.0, np.zeros(5)])
    arrays.assert_close((u * s) @ vt, g)
