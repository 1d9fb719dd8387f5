import numpy as np

from lora_one.core.omega import draw_omega


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
