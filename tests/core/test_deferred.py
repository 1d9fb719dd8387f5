"""A start of the first gradients holds what a start from batches would, whatever common factor the gradients have."""

import numpy as np
import pytest

from lora_one.core.deferred import LEAST_LENGTH, NOISE, StartState, settled, start_state, start_step
from lora_one.core.factors import SYMMETRIC, Factors
from lora_one.core.stacking import stack_of, unstacked
from tests.arrays import ARRAYS, Arrays

NUMPY = Arrays("numpy", "float64")
GAMMA = 128.0
SHAPES = [(40, 24), (24, 40), (12, 40), (40, 10), (8, 8)]  # also with less room than 2 r on one side, or none


@pytest.fixture(params=ARRAYS)
def arrays(request):
    return Arrays(*request.param)


def gradients(shape, count: int, noise: float, seed: int = 0) -> list[np.ndarray]:
    """Gradients with a common part of falling singular values."""
    rng = np.random.default_rng(seed)
    p = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((n, p)))[0] for n in shape)
    common = (u * 0.6 ** np.arange(p)) @ v.T
    return [common + noise * rng.standard_normal(shape) / np.sqrt(shape[0] * shape[1]) for _ in range(count)]


def plain_pair(shape, rank: int = 8) -> Factors:
    a = np.random.default_rng(9).standard_normal((rank, shape[1])) / np.sqrt(3.0 * shape[1])
    return Factors(a, np.zeros((shape[0], rank)))


def run(
    arrays: Arrays, pair: Factors, of_weight: list[np.ndarray], factor: float = 1.0, balance: float = SYMMETRIC
) -> tuple[Factors, StartState]:
    """The pair after these gradients of the weight, by the chain rule."""
    ops = arrays.ops
    pair = Factors(*map(arrays.of, pair))
    state = start_state(ops, pair)
    for g in of_weight:
        g = arrays.of(g) * factor
        gradient = Factors(
            ops.matmul(ops.matrix_transpose(pair.lora_B), g), ops.matmul(g, ops.matrix_transpose(pair.lora_A))
        )
        pair, state = start_step(ops, pair, gradient, state, GAMMA, balance)
    return pair, state


def held(pair: Factors, g: np.ndarray) -> float:
    """The energy that the directions of the factors hold of G over that of its best part of the same rank."""
    u, v = np.linalg.qr(pair.lora_B)[0], np.linalg.qr(pair.lora_A.T)[0]
    best = np.sum(np.linalg.svd(g, compute_uv=False)[: u.shape[1]] ** 2)
    return float(np.sum((u.T @ g @ v) ** 2) / best)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_gradient_again_and_again_gives_its_best_part(arrays, shape):
    (g,) = gradients(shape, 1, 0.0)
    pair, state = run(arrays, plain_pair(shape), [g] * 8)
    lora_A, lora_B = (np.asarray(arrays.numpy(x), np.float64) for x in pair)
    u, s, vt = np.linalg.svd(g)
    assert held(Factors(lora_A, lora_B), g) > 0.99
    expected = -(u[:, :8] * s[:8] / s[0]) @ vt[:8] / GAMMA
    assert np.linalg.norm(lora_B @ lora_A - expected) < 0.1 * np.linalg.norm(expected)
    assert float(arrays.numpy(state.agreement)) > 0.99
    np.testing.assert_allclose(np.asarray(arrays.numpy(state.s))[:3], 7 * s[:3] + s[:3], rtol=0.2)


def test_of_different_gradients_it_holds_nearly_what_their_sum_would():
    shape = (60, 50)
    of_weight = gradients(shape, 6, 0.5)
    pair, _ = run(NUMPY, plain_pair(shape), of_weight)
    total = sum(of_weight)
    u, _, vt = np.linalg.svd(total)
    common = gradients(shape, 1, 0.0)[0]
    best = held(Factors(vt[:8], u[:, :8]), common)
    assert held(pair, common) > 0.9 * best and best < 0.999


@pytest.mark.parametrize("factor", [2.0**40, 2.0**-40])
def test_a_factor_that_is_a_power_of_two_changes_no_bit(arrays, factor):
    of_weight = gradients((40, 24), 4, 0.2)
    pair, state = run(arrays, plain_pair((40, 24)), of_weight)
    other, scaled = run(arrays, plain_pair((40, 24)), of_weight, factor)
    for x, y in zip((*pair, state.agreement, state.s * factor), (*other, scaled.agreement, scaled.s), strict=True):
        np.testing.assert_array_equal(arrays.numpy(x), arrays.numpy(y))


def test_any_other_factor_changes_rounding(arrays):
    of_weight = gradients((40, 24), 4, 0.2)
    pair, _ = run(arrays, plain_pair((40, 24)), of_weight)
    other, _ = run(arrays, plain_pair((40, 24)), of_weight, 3.0)
    for x, y in zip(pair, other, strict=True):
        x, y = (np.asarray(arrays.numpy(z), np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=1e-3 * np.abs(x).max())


def test_the_length_of_plain_loras_rows_does_not_matter():
    of_weight = gradients((40, 24), 3, 0.2)
    plain = plain_pair((40, 24))
    pair, _ = run(NUMPY, plain, of_weight)
    longer, _ = run(NUMPY, plain._replace(lora_A=4.0 * plain.lora_A), of_weight)
    np.testing.assert_allclose(pair.lora_B @ pair.lora_A, longer.lora_B @ longer.lora_A, atol=1e-12)


@pytest.mark.parametrize("entry", [0.0, np.nan, np.inf])
def test_a_gradient_that_is_zero_or_not_finite_changes_nothing(arrays, entry):
    g = gradients((40, 24), 1, 0.0)[0]
    nothing = np.full_like(g, entry)
    for before in ([], [g], [g, g]):
        pair, state = run(arrays, plain_pair((40, 24)), before)
        other, after = run(arrays, plain_pair((40, 24)), [*before, nothing])
        for x, y in zip((*pair, *state), (*other, *after), strict=True):
            np.testing.assert_array_equal(arrays.numpy(x), arrays.numpy(y))


def test_a_gradient_of_lower_rank_than_the_pair_leaves_no_direction_dead(arrays):
    g = np.outer(np.arange(1.0, 41.0), np.arange(1.0, 25.0))
    pair, _ = run(arrays, plain_pair((40, 24)), [g] * 3)
    for factor in pair:
        lengths = np.sort(np.linalg.norm(np.asarray(arrays.numpy(factor), np.float64), axis=1 - factor.shape.index(8)))
        np.testing.assert_allclose(lengths[:7], LEAST_LENGTH / np.sqrt(GAMMA), rtol=0.5)
        np.testing.assert_allclose(lengths[7], np.sqrt(1.0 / GAMMA), rtol=1e-3)
    other = gradients((40, 24), 1, 0.0, seed=3)[0]
    started, _ = run(NUMPY, plain_pair((40, 24)), [g / np.linalg.norm(g)] * 2 + [other] * 8)
    assert held(started, other) > 0.9  # and the next gradients are read in all directions


@pytest.mark.parametrize("balance", [0.0, 0.25])
def test_another_balance_reads_the_same_and_starts_at_the_same_product(arrays, balance):
    of_weight = gradients((40, 24), 6, 0.3)
    (a, b), state = run(arrays, plain_pair((40, 24)), of_weight, balance=balance)
    (paper_a, paper_b), paper_state = run(arrays, plain_pair((40, 24)), of_weight)
    for x, y in zip(state, paper_state, strict=True):
        arrays.assert_close(arrays.numpy(x), arrays.numpy(y))
    arrays.assert_close(arrays.numpy(b) @ arrays.numpy(a), arrays.numpy(paper_b) @ arrays.numpy(paper_a))
    ratios = np.asarray(arrays.numpy(state.s), np.float64) / float(state.s[0])
    rows = 8 ** (1.0 - 2.0 * balance) * ratios ** (2.0 * balance) / GAMMA
    arrays.assert_close(arrays.numpy(a) @ arrays.numpy(a).T, np.diag(rows))


def test_a_vector_of_b_is_never_too_short_to_be_read_again_in_float16():
    g = np.outer(np.arange(1.0, 41.0), np.arange(1.0, 25.0))
    for balance in (0.0, 0.25, 0.5):
        pair, _ = run(NUMPY, plain_pair((40, 24)), [g] * 3, balance=balance)
        lengths = np.linalg.norm(pair.lora_B, axis=0)
        np.testing.assert_allclose(lengths / lengths[0], [1.0, *[LEAST_LENGTH] * 7], rtol=1e-6)


def test_a_stack_is_its_layers():
    of_weight = [gradients((40, 24), 3, 0.2, seed) for seed in (0, 1)]
    pairs = [run(NUMPY, plain_pair((40, 24)), of_layer) for of_layer in of_weight]
    ops, pair = NUMPY.ops, stack_of(NUMPY.ops, [plain_pair((40, 24))] * 2)
    state = start_state(ops, pair)
    for g in (np.stack(x) for x in zip(*of_weight, strict=True)):
        gradient = Factors(pair.lora_B.swapaxes(-1, -2) @ g, g @ pair.lora_A.swapaxes(-1, -2))
        pair, state = start_step(ops, pair, gradient, state, GAMMA, SYMMETRIC)
    for (expected, expected_state), got, got_state in zip(pairs, unstacked(pair, 2), unstacked(state, 2), strict=True):
        for x, y in zip((*expected, *expected_state), (*got, *got_state), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)


def test_narrow_factors_start_within_their_rounding():
    torch = pytest.importorskip("torch")
    from lora_one.backends.torch import TorchOps

    ops, of_weight = TorchOps(), gradients((40, 24), 5, 0.2)
    expected, _ = run(NUMPY, plain_pair((40, 24)), of_weight)
    pair = Factors(*(torch.tensor(x, dtype=torch.bfloat16) for x in plain_pair((40, 24))))
    state = start_state(ops, pair)
    assert state.s.dtype == torch.float32
    for g in of_weight:
        wide = torch.tensor(g, dtype=torch.float32)
        gradient = Factors(pair.lora_B.float().T @ wide, wide @ pair.lora_A.float().T)
        pair, state = start_step(ops, pair, Factors(*(x.bfloat16() for x in gradient)), state, GAMMA, SYMMETRIC)
    assert pair.lora_A.dtype == torch.bfloat16
    product = pair.lora_B.double().numpy() @ pair.lora_A.double().numpy()
    exact = expected.lora_B @ expected.lora_A
    assert np.linalg.norm(product - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("steps", [1, 6, 16])
def test_settled_when_the_noise_left_in_the_sum_is_small(steps):
    """Cosine a: noise of one gradient over the signal is 1 / a^2 - 1 in energy, of the sum of n an n-th of it."""
    edge = 1.0 / np.sqrt(1.0 + NOISE * steps)
    for a, expected in ((edge - 1e-6, False), (edge + 1e-6, True), (-0.99, False), (0.0, False)):
        states = [StartState(np.ones(3), np.array(a)), StartState(np.ones((2, 3)), np.full(2, a))]
        assert bool(settled(NUMPY.ops, np.array(float(steps)), states)) is expected
        unread = StartState(np.zeros(3), np.array(0.0))  # no gradient reached it
        assert bool(settled(NUMPY.ops, np.array(float(steps)), [*states, unread])) is expected
