"""The triplets of block Golub-Kahan are right where parts of a block are rounding noise."""

import numpy as np
import pytest

from lora_one.core.krylov import leading_triplets
from lora_one.core.omega import draw_omega
from tests.arrays import Arrays, best_rank, spectrum_matrix


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_triplets_where_a_block_is_partly_rounding_noise(dtype):
    """Rank 30 in blocks of 20: the second block has 10 true directions and 10 that must not repeat earlier ones. Most
    rows and columns are zero, so that the noise lies where the earlier directions do."""
    arrays = Arrays("numpy", dtype)
    decay = 0.95 ** np.arange(30)
    g = np.zeros((400, 320))
    g[::10, ::8] = spectrum_matrix(40, 40, decay)
    omega = arrays.of(draw_omega(0, "layer", 320, 20))
    [triplets] = leading_triplets(arrays.ops, [arrays.of(g)], omega, 12, 1e-4)
    u, s, vt = (np.asarray(x, dtype=np.float64) for x in triplets[:3])
    arrays.assert_close(s, decay[:12])
    arrays.assert_close((u * s) @ vt, best_rank(g, 12))


def test_triplets_of_a_matrix_with_fewer_directions_than_asked_for():
    arrays = Arrays("numpy", "float64")
    g = spectrum_matrix(400, 320, np.array([3.0, 2.0, 1.0]))
    [(u, s, vt, best_norm)] = leading_triplets(arrays.ops, [g], draw_omega(0, "layer", 320, 16), 8, 1e-4)
    arrays.assert_close(s, np.r_[3.0, 2.0, 1.0, np.zeros(5)])
    arrays.assert_close((u * s) @ vt, g)
    arrays.assert_close(best_norm, np.asarray(np.sqrt(14.0)))
