import math

import numpy as np
import pytest

from lora_one.core.exact import exact_spectrum
from lora_one.core.factors import SYMMETRIC, gradient_factors, normalized_factors, plain_factors
from lora_one.core.omega import draw_omega
from tests.arrays import best_rank, spectrum_matrix

G = spectrum_matrix(30, 20, 3.0 / np.arange(1, 21))


@pytest.mark.parametrize("gamma", [1.0, 128.0])
def test_normalized_product_is_one_step_of_spectral_norm_one_over_gamma(arrays, gamma):
    factors = normalized_factors(arrays.ops, exact_spectrum(arrays.ops, arrays.of(G), 4), gamma)
    product = arrays.numpy(factors.lora_B) @ arrays.numpy(factors.lora_A)
    arrays.assert_close(product, -best_rank(G, 4) / np.linalg.norm(G, 2) / gamma)


def test_the_papers_factors_are_balanced_and_hold_the_square_roots_of_the_singular_values(arrays):
    """A A^T = B^T B = diag(S_i / S_1) / gamma: sqrt(S / S_1) as in the authors' code, not S as in their README."""
    factors = normalized_factors(arrays.ops, exact_spectrum(arrays.ops, arrays.of(G), 4), 128.0, SYMMETRIC)
    a, b = arrays.numpy(factors.lora_A), arrays.numpy(factors.lora_B)
    expected = np.diag(1.0 / np.arange(1, 5)) / 128
    arrays.assert_close(a @ a.T, expected)
    arrays.assert_close(b.T @ b, expected)


@pytest.mark.parametrize("balance", [0.0, 0.25])
@pytest.mark.parametrize("scale", ["normalized", "gradient"])
def test_another_balance_has_the_same_product_and_as_much_in_the_rows_of_a_as_it_says(arrays, balance, scale):
    """A A^T = r^(1 - 2p) w_1 (S / S_1)^(2p) with w_1 the first weight of B A; at p = 0 all rows are equally long."""
    make, size, first = {
        "normalized": (normalized_factors, 128.0, 1.0 / 128.0),
        "gradient": (gradient_factors, 0.3, 0.3 * 3.0),
    }[scale]
    spectrum = exact_spectrum(arrays.ops, arrays.of(G), 4)
    a, b = (arrays.numpy(x) for x in make(arrays.ops, spectrum, size, balance))
    paper_a, paper_b = (arrays.numpy(x) for x in make(arrays.ops, spectrum, size, SYMMETRIC))
    arrays.assert_close(b @ a, paper_b @ paper_a)
    ratios = 1.0 / np.arange(1, 5)
    rows = 4 ** (1.0 - 2.0 * balance) * first * ratios ** (2.0 * balance)
    arrays.assert_close(a @ a.T, np.diag(rows))
    arrays.assert_close(b.T @ b, np.diag((first * ratios) ** 2 / rows))


def test_normalized_start_does_not_depend_on_the_gradients_scale(arrays):
    plain = normalized_factors(arrays.ops, exact_spectrum(arrays.ops, arrays.of(G), 4), 128.0)
    scaled = normalized_factors(arrays.ops, exact_spectrum(arrays.ops, arrays.of(G * 1e-12), 4), 128.0)
    product = arrays.numpy(plain.lora_B) @ arrays.numpy(plain.lora_A)
    arrays.assert_close(arrays.numpy(scaled.lora_B) @ arrays.numpy(scaled.lora_A), product)


def test_gradient_scale_is_a_step_of_gradient_descent(arrays):
    factors = gradient_factors(arrays.ops, exact_spectrum(arrays.ops, arrays.of(G), 4), eta=0.3)
    arrays.assert_close(arrays.numpy(factors.lora_B) @ arrays.numpy(factors.lora_A), -0.3 * best_rank(G, 4))


def test_full_rank_takes_the_whole_gradient(arrays):
    factors = gradient_factors(arrays.ops, exact_spectrum(arrays.ops, arrays.of(G), 20), eta=1.0)
    arrays.assert_close(arrays.numpy(factors.lora_B) @ arrays.numpy(factors.lora_A), -G)


def test_plain_start_has_the_variance_of_kaiming_uniform_and_a_zero_b(arrays):
    omega = draw_omega(0, "layer", 400, 12)
    factors = plain_factors(arrays.ops, arrays.of(omega), 8, 60)
    a = arrays.numpy(factors.lora_A)
    arrays.assert_close(a, omega[:, :8].T / math.sqrt(3 * 400))
    assert a.std() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)
    assert arrays.numpy(factors.lora_B).shape == (60, 8)
    assert not arrays.numpy(factors.lora_B).any()
