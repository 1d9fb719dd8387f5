"""The fold of many batches is what its definition says, on every backend, and holds what a start needs."""

import numpy as np
import pytest

from lora_one.core.fold import FoldState, finish_fold, fold, merge_folds, read_both_sides, start_fold
from lora_one.core.gradient import RowProduct
from lora_one.core.omega import draw_omega
from lora_one.core.sides import Products
from lora_one.core.stacking import stack_of, unstacked
from tests.arrays import ARRAYS, Arrays, assert_same_spectrum, descent, spectrum_matrix, unlike_gradients

SHAPES = [(40, 40), (60, 24), (24, 60)]
NUMPY = Arrays("numpy", "float64")


@pytest.fixture(params=ARRAYS)
def arrays(request):
    return Arrays(*request.param)


def started(arrays: Arrays, shape: tuple[int, int], k: int) -> FoldState:
    omega, test = draw_omega(0, "layer", shape[1], k), draw_omega(0, "layer, test", shape[1], 8)
    return start_fold(arrays.ops, arrays.of(omega), shape[0], arrays.of(test))


def folded(arrays: Arrays, gradients: list, k: int) -> FoldState:
    state = started(arrays, gradients[0].shape, k)
    for gradient in gradients:
        rows = isinstance(gradient, RowProduct)
        state = fold(arrays.ops, state, RowProduct(*map(arrays.of, gradient)) if rows else arrays.of(gradient))
    return state


def token_rows(seed: int, tokens: int, shape: tuple[int, int]) -> RowProduct:
    """Rows whose product has singular values that fall as those of gradients do."""
    rng = np.random.default_rng(seed)
    decay = 0.8 ** np.arange(tokens)[:, None]
    return RowProduct(rng.standard_normal((tokens, shape[0])) * decay, rng.standard_normal((tokens, shape[1])))


def share_of_best(g: np.ndarray, u: np.ndarray, v: np.ndarray) -> float:
    """The energy that U^T G V holds over that of the best part of G of the same rank."""
    best = np.sum(np.linalg.svd(g, compute_uv=False)[: u.shape[1]] ** 2)
    return float(np.sum((u.T @ g @ v) ** 2) / best)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_of_low_rank_is_held_whole(arrays, shape):
    """Three batches of rank 2, 2 and 1 with k = 6: nothing is cut, whatever the order."""
    parts = [spectrum_matrix(*shape, np.array(s), seed=i) for i, s in enumerate(([4.0, 2.0], [3.0, 1.0], [2.5]))]
    for order in (parts, parts[::-1]):
        spectrum = finish_fold(arrays.ops, folded(arrays, order, 6), 5)
        arrays.assert_close(descent(arrays, spectrum), -sum(parts), factor=3)
        arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(sum(parts))), factor=3)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_what_their_product_is(arrays, shape):
    rows = [token_rows(seed, 12, shape) for seed in range(3)]
    wholes = [r.dy.T @ r.x for r in rows]
    one, other = (finish_fold(arrays.ops, folded(arrays, list(gs), 8), 4) for gs in (rows, wholes))
    assert_same_spectrum(arrays, one, other, sum(wholes))


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_tokens_than_directions_leave_orthonormal_factors(arrays, shape):
    """A batch of two tokens has rank 2, the state has k = 8: the other directions must not spoil the basis."""
    state = folded(arrays, [token_rows(seed, 2, shape) for seed in range(2)], 8)
    for x in (arrays.numpy(state.u), arrays.numpy(state.v)):
        np.testing.assert_allclose(x.T @ x, np.eye(8), atol=10 * arrays.tolerance)
    whole = sum(r.dy.T @ r.x for r in (token_rows(seed, 2, shape) for seed in range(2)))
    arrays.assert_close(descent(arrays, finish_fold(arrays.ops, state, 4)), -whole, factor=3)


def test_no_gradient_is_zero_and_finite(arrays):
    spectrum = finish_fold(arrays.ops, folded(arrays, [np.zeros((20, 30))] * 2, 6), 4)
    assert all(np.isfinite(arrays.numpy(x)).all() for x in spectrum)
    assert not arrays.numpy(spectrum.s).any() and arrays.numpy(spectrum.norm) == arrays.numpy(spectrum.unseen) == 0


@pytest.mark.parametrize("scale", [2.0**-66, 2.0**66])
def test_a_scale_changes_nothing_but_the_singular_values(arrays, scale):
    """float32 cannot hold the squares of these numbers."""
    gradients = [spectrum_matrix(30, 20, 0.8 ** np.arange(20), seed=seed) for seed in range(2)]
    one, other = (finish_fold(arrays.ops, folded(arrays, [g * c for g in gradients], 8), 4) for c in (1.0, scale))
    arrays.assert_close(descent(arrays, other) / scale, descent(arrays, one))
    for name in ("s", "norm", "norm_error", "unseen", "best_norm"):
        arrays.assert_close(arrays.numpy(getattr(other, name)) / scale, arrays.numpy(getattr(one, name)))


def test_layers_in_a_stack_get_what_they_get_alone(arrays):
    layers = unlike_gradients((30, 20))
    batches = [layers, [g[::-1].copy() for g in layers]]
    states = [started(arrays, (30, 20), 8) for _ in layers]
    stack = stack_of(arrays.ops, states)
    for gradients in batches:
        states = [fold(arrays.ops, s, arrays.of(g)) for s, g in zip(states, gradients, strict=True)]
        stack = fold(arrays.ops, stack, arrays.of(np.stack(gradients)))
    together = unstacked(finish_fold(arrays.ops, stack, 4), len(layers))
    for got, state, parts in zip(together, states, zip(*batches, strict=True), strict=True):
        assert_same_spectrum(arrays, got, finish_fold(arrays.ops, state, 4), sum(parts))


@pytest.mark.parametrize("pieces", [1, 4, 24])
def test_however_the_data_is_cut_little_is_lost(pieces):
    """The same 96 tokens in one batch, four, or twenty-four."""
    dy, x = token_rows(0, 96, (80, 60))
    x = x + 0.3 * dy[:, :60]
    batches = [RowProduct(a, b) for a, b in zip(np.split(dy, pieces), np.split(x, pieces), strict=True)]
    state = folded(NUMPY, batches, 20)
    assert share_of_best(dy.T @ x, state.u[:, :4], state.v[:, :4]) > 0.99


def noisy_batches(count: int = 6, noise: float = 0.01) -> list[np.ndarray]:
    """A common part that decays, and in each batch noise of its own: a fold cannot hold it all."""
    common = spectrum_matrix(120, 90, 0.85 ** np.arange(60))
    rng = np.random.default_rng(1)
    return [common / count + noise * rng.standard_normal((120, 90)) for _ in range(count)]


def test_both_sides_know_all_but_the_block_outside():
    """Against the definition: the best rank-k part of U U^T G + G V V^T - U U^T G V V^T."""
    batches = noisy_batches()
    g, state = sum(batches), folded(NUMPY, batches, 12)
    after = read_both_sides(NUMPY.ops, state, Products(g @ state.v, g.T @ state.u))
    left, right = state.u @ state.u.T, state.v @ state.v.T
    u, s, vt = np.linalg.svd(left @ g + g @ right - left @ g @ right)
    np.testing.assert_allclose((after.u * after.s) @ after.v.T, (u[:, :12] * s[:12]) @ vt[:12], atol=1e-12)
    np.testing.assert_allclose(after.u.T @ after.u, np.eye(12), atol=1e-13)
    shares = [share_of_best(g, f.u[:, :4], f.v[:, :4]) for f in (state, after)]
    assert shares[0] < shares[1] and 1.0 - shares[1] < 0.5 * (1.0 - shares[0])


def test_merged_states_are_the_best_part_of_their_sum():
    batches = noisy_batches(noise=0.002)
    one, other = folded(NUMPY, batches[:3], 12), folded(NUMPY, batches[3:], 12)
    merged = merge_folds(NUMPY.ops, one, other)
    u, s, vt = np.linalg.svd(sum((f.u * f.s) @ f.v.T for f in (one, other)))
    np.testing.assert_allclose((merged.u * merged.s) @ merged.v.T, (u[:, :12] * s[:12]) @ vt[:12], atol=1e-12)
    np.testing.assert_allclose(merged.tested, sum(batches) @ merged.test, atol=1e-12)
    alone = folded(NUMPY, batches, 12)
    losses = [1.0 - share_of_best(sum(batches), f.u[:, :4], f.v[:, :4]) for f in (alone, merged)]
    assert losses[1] < losses[0] + 0.02


def test_a_state_without_batches_merges_and_leaves_the_other():
    state = folded(NUMPY, noisy_batches(), 12)
    merged = merge_folds(NUMPY.ops, started(NUMPY, (120, 90), 12), state)
    np.testing.assert_allclose((merged.u * merged.s) @ merged.v.T, (state.u * state.s) @ state.v.T, atol=1e-13)


def test_estimates_are_near_the_truth():
    """The norm and what is unseen, from 8 Gaussian columns: within three standard errors of the truth."""
    batches = noisy_batches(noise=0.002)
    g, state = sum(batches), folded(NUMPY, batches, 12)
    spectrum = finish_fold(NUMPY.ops, state, 4)
    unseen = np.linalg.norm(g - (state.u * state.s) @ state.v.T)
    assert abs(spectrum.norm - np.linalg.norm(g)) < 3 * spectrum.norm_error + 0.01 * np.linalg.norm(g)
    assert abs(spectrum.unseen / unseen - 1.0) < 0.3
    best = np.linalg.norm(np.linalg.svd(g, compute_uv=False)[:4])
    assert 0.98 * best < spectrum.best_norm < 1.05 * best


def test_a_width_beyond_the_layer_and_a_rank_beyond_the_width_are_refused():
    with pytest.raises(ValueError, match=r"width must be <= min\(out, in\) = 5, got 6"):
        started(NUMPY, (5, 9), 6)
    with pytest.raises(ValueError, match="rank must be <= 4, the width of the state, got 5"):
        finish_fold(NUMPY.ops, started(NUMPY, (8, 9), 4), 5)


def test_a_state_as_wide_as_the_layer_holds_all(arrays):
    batches = [spectrum_matrix(9, 7, 0.5 ** np.arange(7), seed=seed) for seed in range(3)]
    spectrum = finish_fold(arrays.ops, folded(arrays, batches, 7), 7)
    arrays.assert_close(descent(arrays, spectrum), -sum(batches), factor=5)
