import numpy as np
import pytest
import scipy.linalg

from lora_one.core.alignment import captured_energy, principal_cosines, principal_sines
from lora_one.core.exact import exact_spectrum
from lora_one.core.factors import normalized_factors
from tests.arrays import Arrays, spectrum_matrix


@pytest.mark.parametrize(("p", "q"), [(3, 3), (5, 2), (2, 5), (1, 1)])
def test_principal_angles_are_scipys(arrays, p, q):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, p)), rng.standard_normal((20, q))
    angles = np.sort(scipy.linalg.subspace_angles(x, y))
    arrays.assert_close(principal_cosines(arrays.ops, arrays.of(x), arrays.of(y)), np.cos(angles), factor=3)
    arrays.assert_close(principal_sines(arrays.ops, arrays.of(x), arrays.of(y)), np.sin(angles)[::-1], factor=3)


def test_sines_see_angles_that_cosines_cannot():
    arrays = Arrays("numpy", "float64")
    x = np.eye(6)[:, :1]
    y = np.array([[1.0, 1e-10, 0, 0, 0, 0]]).T
    assert principal_sines(arrays.ops, x, y)[0] == pytest.approx(1e-10, rel=1e-5)
    assert principal_cosines(arrays.ops, x, y)[0] == 1.0


def test_captured_energy_of_the_truncated_svd_is_the_sum_of_its_squares(arrays):
    s = 1.0 / np.arange(1, 21)
    g = spectrum_matrix(30, 20, s)
    for scale in (1.0, 1e20):
        factors = normalized_factors(arrays.ops, exact_spectrum(arrays.ops, arrays.of(g * scale), 4), 128.0)
        energy = captured_energy(arrays.ops, arrays.of(g * scale), factors)
        arrays.assert_close(energy, np.asarray(np.sum(s[:4] ** 2) / np.sum(s**2)))
