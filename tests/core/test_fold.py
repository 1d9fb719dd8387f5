"""The fold of many batches is what its definition says, on every backend, and holds what a start needs."""

import numpy as np
import pytest

from lora_one.core.fold import FoldState, aim, finish_fold, fold, merge_folds, of_mean, read_both_sides, start_fold
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


def by_sides(arrays: Arrays, g: np.ndarray, k: int, passes: int) -> FoldState:
    """The state after passes that read both sides of G, the first of them random sides."""
    state, left = started(arrays, g.shape, k), draw_omega(0, "layer, left", g.shape[0], k)
    v, test = arrays.numpy(state.v), arrays.numpy(state.test)
    products = Products(arrays.of(g @ np.concatenate([v, test], axis=1)), arrays.of(g.T @ left))
    state = aim(arrays.ops, state, products)
    for _ in range(passes - 1):
        products = Products(arrays.of(g @ arrays.numpy(state.v)), arrays.of(g.T @ arrays.numpy(state.u)))
        state = read_both_sides(arrays.ops, state, products)
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


@pytest.mark.parametrize("rank", [3, 5, 20, 30])
@pytest.mark.parametrize("batches", [1, 3])
def test_noise_that_has_no_room_outside_the_basis_is_no_direction(rank, batches):
    """Most rows and columns are zero, and G has fewer directions than are followed: the rest of a block is noise."""
    arrays = Arrays("numpy", "float32")
    g, s = np.zeros((400, 320)), 0.95 ** np.arange(rank)
    g[::10, ::8] = spectrum_matrix(40, 40, s)
    state = folded(arrays, [g / batches] * batches, 24)
    expected = np.sum(s[:24] ** 2)
    assert np.sum(arrays.numpy(state.s) ** 2) == pytest.approx(expected, rel=0.05)
    if batches == 1:
        arrays.assert_close(state.s, np.r_[s, np.zeros(24)][:24])


def test_no_gradient_is_zero_and_finite(arrays):
    state = folded(arrays, [np.zeros((20, 30))] * 2, 6)
    nothing = Products(arrays.ops.zeros((20, 14), arrays.like), arrays.ops.zeros((30, 6), arrays.like))
    for after in (state, read_both_sides(arrays.ops, aim(arrays.ops, state, nothing), first_columns(nothing, 6))):
        spectrum = finish_fold(arrays.ops, after, 4)
        assert all(np.isfinite(arrays.numpy(x)).all() for x in (*after, *spectrum))
        assert not arrays.numpy(spectrum.s).any()
        assert arrays.numpy(spectrum.norm) == arrays.numpy(spectrum.unseen) == arrays.numpy(spectrum.best_norm) == 0


def first_columns(products: Products, k: int) -> Products:
    return Products(products.g_right[:, :k], products.g_left)


def test_batches_without_a_gradient_change_nothing(arrays):
    """A layer that only some batches reach: the first one draws its directions from noise, others go on."""
    g, none = spectrum_matrix(20, 30, 0.5 ** np.arange(5)), np.zeros((20, 30))
    for batches in ([none, g], [g, none], [none, g, none]):
        spectrum = finish_fold(arrays.ops, folded(arrays, batches, 6), 5)
        arrays.assert_close(descent(arrays, spectrum), -g, factor=3)
        arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(g)), factor=3)


def test_the_mean_is_the_sum_divided(arrays):
    batches = [spectrum_matrix(30, 20, 0.8 ** np.arange(20), seed=seed) for seed in range(3)]
    total = folded(arrays, batches, 8)
    mean, whole = finish_fold(arrays.ops, of_mean(arrays.ops, total, 3), 4), finish_fold(arrays.ops, total, 4)
    arrays.assert_close(descent(arrays, mean) * 3, descent(arrays, whole))
    for name in ("s", "norm", "norm_error", "unseen", "best_norm"):
        arrays.assert_close(arrays.numpy(getattr(mean, name)) * 3, arrays.numpy(getattr(whole, name)))


@pytest.mark.parametrize("scale", [2.0**-66, 2.0**66])
def test_a_scale_changes_nothing_but_the_singular_values(arrays, scale):
    """float32 cannot hold the squares of these numbers."""
    gradients = [spectrum_matrix(30, 20, 0.8 ** np.arange(20), seed=seed) for seed in range(2)]
    one, other = (finish_fold(arrays.ops, folded(arrays, [g * c for g in gradients], 8), 4) for c in (1.0, scale))
    arrays.assert_close(descent(arrays, other) / scale, descent(arrays, one))
    for name in ("s", "norm", "norm_error", "unseen", "best_norm"):
        arrays.assert_close(arrays.numpy(getattr(other, name)) / scale, arrays.numpy(getattr(one, name)))


@pytest.mark.parametrize("scale", [2.0**-66, 2.0**66])
def test_passes_of_random_sides_do_not_feel_the_scale_either(arrays, scale):
    g = spectrum_matrix(30, 20, 0.8 ** np.arange(20))
    one, other = (finish_fold(arrays.ops, by_sides(arrays, g * c, 8, passes=3), 4) for c in (1.0, scale))
    arrays.assert_close(descent(arrays, other) / scale, descent(arrays, one))
    arrays.assert_close(arrays.numpy(other.best_norm) / scale, arrays.numpy(one.best_norm))


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
    turns = [np.sum((new - side @ new) ** 2, axis=0) for side, new in ((left, after.u), (right, after.v))]
    np.testing.assert_allclose(after.turn, sum(turns), rtol=1e-9, atol=1e-14)
    np.testing.assert_array_equal(state.turn, 1.0 / 8.0)


def test_passes_of_random_sides_find_the_best_part(arrays):
    """Bases aimed at by one pass hold most of it, and those of a further pass nearly all."""
    g = spectrum_matrix(60, 50, 0.8 ** np.arange(50))
    lost = []
    for passes in (2, 3, 4):
        state = by_sides(arrays, g, 12, passes)
        u, v = (arrays.numpy(x) for x in (state.u, state.v))
        for x in (u, v):
            np.testing.assert_allclose(x.T @ x, np.eye(12), atol=10 * arrays.tolerance)
        arrays.assert_close(state.tested, g @ arrays.numpy(state.test))
        lost.append(1.0 - share_of_best(g, u[:, :4], v[:, :4]))
    assert lost[0] < 0.01 and lost[1] < 0.1 * lost[0] and lost[2] < 1e-5


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


def test_a_width_beyond_the_layer_and_a_rank_beyond_the_width_are_refused():
    with pytest.raises(ValueError, match=r"width must be <= min\(out, in\) = 5, got 6"):
        started(NUMPY, (5, 9), 6)
    with pytest.raises(ValueError, match="rank must be <= 4, the width of the state, got 5"):
        finish_fold(NUMPY.ops, started(NUMPY, (8, 9), 4), 5)


def test_a_state_as_wide_as_the_layer_holds_all(arrays):
    batches = [spectrum_matrix(9, 7, 0.5 ** np.arange(7), seed=seed) for seed in range(3)]
    spectrum = finish_fold(arrays.ops, folded(arrays, batches, 7), 7)
    arrays.assert_close(descent(arrays, spectrum), -sum(batches), factor=5)
    arrays.assert_close(spectrum.norm, np.asarray(np.linalg.norm(sum(batches))))
    arrays.assert_close(spectrum.best_norm, np.asarray(np.linalg.norm(sum(batches))))
    assert arrays.numpy(spectrum.norm_error) == arrays.numpy(spectrum.unseen) == 0
