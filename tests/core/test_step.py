import numpy as np
import pytest
import torch

from lora_one.core import step
from lora_one.core.factors import Factors
from lora_one.core.precondition import apply_inverses, damped_inverse, grams, precondition
from tests.arrays import Arrays, spectrum_matrix


def pair(seed: int, r: int = 4, out: int = 12, in_: int = 9) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(rng.standard_normal((r, in_)), rng.standard_normal((out, r)))


def on(arrays: Arrays, factors: Factors) -> Factors:
    return Factors(*(arrays.of(x) for x in factors))


def by_hand(p: Factors, g: Factors, reg: float) -> Factors:
    """The formula with a plain inverse: the paper's Algorithm 1."""
    eye = np.eye(p.lora_A.shape[0])
    return Factors(
        np.linalg.inv(p.lora_B.T @ p.lora_B + reg * eye) @ g.lora_A,
        g.lora_B @ np.linalg.inv(p.lora_A @ p.lora_A.T + reg * eye),
    )


@pytest.mark.parametrize("reg", [1e-6, 1e-2, 1.0])
def test_precondition_is_the_papers_formula(arrays, reg):
    p, g = pair(0), pair(1)
    got = precondition(arrays.ops, on(arrays, p), on(arrays, g), reg)
    arrays.assert_close(got.lora_A, by_hand(p, g, reg).lora_A, factor=10)
    arrays.assert_close(got.lora_B, by_hand(p, g, reg).lora_B, factor=10)


def test_relative_damping_does_not_depend_on_the_factors_scale(arrays):
    """With A -> cA, B -> cB and relative reg the preconditioned gradient just scales by 1 / c^2."""
    p, g, c = pair(0), pair(1), 1e-3
    small = Factors(p.lora_A * c, p.lora_B * c)
    plain = precondition(arrays.ops, on(arrays, p), on(arrays, g), 1e-2, "relative")
    scaled = precondition(arrays.ops, on(arrays, small), on(arrays, g), 1e-2, "relative")
    arrays.assert_close(arrays.numpy(scaled.lora_A) * c**2, arrays.numpy(plain.lora_A), factor=10)
    mean = np.trace(p.lora_B.T @ p.lora_B) / 4
    arrays.assert_close(plain.lora_A, by_hand(p, g, 1e-2 * mean).lora_A, factor=10)


def test_step_does_not_depend_on_the_basis_of_the_factors(arrays):
    """(B R, R^-1 A) is the same adapter; preconditioned descent moves both to the same product, to first order."""
    p, g, lr = pair(0), pair(1), 1e-7
    mix = spectrum_matrix(4, 4, np.array([3.0, 2.0, 1.0, 0.5]))
    inverse = np.linalg.inv(mix)
    other_p = Factors(inverse @ p.lora_A, p.lora_B @ mix)
    other_g = Factors(mix.T @ g.lora_A, g.lora_B @ inverse.T)  # the chain rule
    moved, other_moved = (b @ by_hand(Factors(a, b), slope, 0).lora_A for (a, b), slope in ((p, g), (other_p, other_g)))
    np.testing.assert_allclose(moved, other_moved, atol=1e-10)
    a = step.gradient_descent(arrays.ops, on(arrays, p), on(arrays, g), lr, reg=1e-12)
    b = step.gradient_descent(arrays.ops, on(arrays, other_p), on(arrays, other_g), lr, reg=1e-12)
    arrays.assert_close(product(arrays, a), product(arrays, b), factor=10)


def product(arrays: Arrays, factors: Factors) -> np.ndarray:
    return arrays.numpy(factors.lora_B) @ arrays.numpy(factors.lora_A)


def test_zero_and_rank_deficient_factors_give_finite_gradients(arrays):
    g = pair(1)
    for p in (Factors(pair(0).lora_A, np.zeros((12, 4))), Factors(np.ones((4, 9)) * 1e3, np.ones((12, 4)) * 1e3)):
        for damping in ("absolute", "relative"):
            got = precondition(arrays.ops, on(arrays, p), on(arrays, g), 1e-6, damping)
            assert np.isfinite(arrays.numpy(got.lora_A)).all()
            assert np.isfinite(arrays.numpy(got.lora_B)).all()


def test_a_gram_that_is_not_finite_gives_nan_and_leaves_its_neighbours_alone(arrays):
    good = np.eye(3)
    bad = np.full((3, 3), np.nan)
    got = arrays.numpy(damped_inverse(arrays.ops, arrays.of(np.stack([good, bad])), 1.0))
    arrays.assert_close(got[0], np.eye(3) / 2)
    assert np.isnan(got[1]).all()


def test_cholesky_solve_of_a_matrix_that_is_not_positive_definite_is_nan(arrays):
    gram = arrays.of(np.stack([np.diag([1.0, -1.0]), np.eye(2)]))
    got = arrays.numpy(arrays.ops.cholesky_solve(gram, arrays.of(np.eye(2))))
    assert np.isnan(got[0]).all()
    arrays.assert_close(got[1], np.eye(2))


def test_many_pairs_at_once_equal_one_by_one(arrays):
    pairs, gradients = [pair(i) for i in range(3)], [pair(10 + i) for i in range(3)]
    stacked = [
        Factors(arrays.of(np.stack([f.lora_A for f in fs])), arrays.of(np.stack([f.lora_B for f in fs])))
        for fs in (pairs, gradients)
    ]
    got = precondition(arrays.ops, *stacked, reg=1e-3)
    gram_b, gram_a = grams(arrays.ops, stacked[0])
    again = apply_inverses(
        arrays.ops,
        stacked[1],
        damped_inverse(arrays.ops, gram_b, 1e-3),
        damped_inverse(arrays.ops, gram_a, 1e-3),
    )
    for i in range(3):
        expected = by_hand(pairs[i], gradients[i], 1e-3)
        arrays.assert_close(arrays.numpy(got.lora_A)[i], expected.lora_A, factor=10)
        arrays.assert_close(arrays.numpy(again.lora_B)[i], expected.lora_B, factor=10)


@pytest.mark.parametrize("reg", [None, 1e-2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torch_adamw_on_the_preconditioned_gradients(arrays, reg, weight_decay):
    p = pair(0)
    ours, state = on(arrays, p), step.start_pair(arrays.ops, on(arrays, p))
    a, b = (torch.nn.Parameter(torch.tensor(x)) for x in p)
    reference = torch.optim.AdamW([a, b], lr=1e-2, weight_decay=weight_decay)
    for i in range(20):
        g = pair(100 + i)
        ours, state = step.adamw(arrays.ops, ours, on(arrays, g), state, 1e-2, weight_decay=weight_decay, reg=reg)
        direction = g if reg is None else by_hand(Factors(a.detach().numpy(), b.detach().numpy()), g, reg)
        a.grad, b.grad = (torch.tensor(x) for x in direction)
        reference.step()
    arrays.assert_close(ours.lora_A, a.detach().numpy(), factor=10)
    arrays.assert_close(ours.lora_B, b.detach().numpy(), factor=10)
    assert state.lora_A.steps == state.lora_B.steps == 20


def test_gradient_descent_updates_both_factors_from_the_old_pair(arrays):
    """A sequential update (B from the new A) would be another algorithm."""
    p, g = pair(0), pair(1)
    got = step.gradient_descent(arrays.ops, on(arrays, p), on(arrays, g), 0.1, reg=1e-3)
    expected = by_hand(p, g, 1e-3)
    arrays.assert_close(got.lora_A, p.lora_A - 0.1 * expected.lora_A, factor=10)
    arrays.assert_close(got.lora_B, p.lora_B - 0.1 * expected.lora_B, factor=10)


def test_narrow_parameters_step_in_float32_and_come_back_narrow():
    arrays = Arrays("torch", "float32")
    p, g = (Factors(*(torch.tensor(x).bfloat16() for x in pair(i))) for i in (0, 1))
    new, state = step.adamw(arrays.ops, p, g, step.start_pair(arrays.ops, p), 1e-2, reg=1e-2)
    assert new.lora_A.dtype == new.lora_B.dtype == torch.bfloat16
    assert state.lora_A.mean.dtype == state.lora_B.square.dtype == torch.float32
    wide = Factors(*(x.float() for x in p)), Factors(*(x.float() for x in g))
    expected, _ = step.adamw(arrays.ops, *wide, step.start_pair(arrays.ops, wide[0]), 1e-2, reg=1e-2)
    assert torch.equal(new.lora_A, expected.lora_A.bfloat16())


def test_preconditioned_descent_recovers_a_low_rank_target_at_a_rate_independent_of_its_condition():
    """min 1/2 ||B A - T||^2 from the spectral start (arXiv 2502.01235, Theorem 4.1's setting), float64."""
    arrays = Arrays("numpy", "float64")
    losses = {}
    for kappa in (1.0, 1e3):
        target = spectrum_matrix(20, 15, np.geomspace(1.0, 1.0 / kappa, 4))
        u, s, vt = np.linalg.svd(target)
        start = Factors(0.5 * np.sqrt(s[:4, None]) * vt[:4], 0.5 * u[:, :4] * np.sqrt(s[:4]))
        for reg in (None, 1e-12):
            current = start
            for _ in range(40):
                residual = current.lora_B @ current.lora_A - target
                gradient = Factors(current.lora_B.T @ residual, residual @ current.lora_A.T)
                current = step.gradient_descent(arrays.ops, current, gradient, 0.3, reg)
            losses[kappa, reg] = np.linalg.norm(current.lora_B @ current.lora_A - target) / s[3]
    assert losses[1.0, 1e-12] == pytest.approx(losses[1e3, 1e-12], rel=1e-3)
    assert losses[1e3, 1e-12] < 1e-7
    assert losses[1e3, None] > 0.5
