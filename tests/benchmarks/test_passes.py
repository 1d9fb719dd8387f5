"""`benchmarks.passes`: what is told beside what is held, on spectra whose answers are known."""

import itertools

import numpy as np
import pytest

from benchmarks.passes import measured, table

STEEP, FLAT = np.diag(0.5 ** np.arange(100)), np.diag(np.linspace(1.0, 0.5, 100))


def test_a_steep_spectrum_ends_after_one_pass_and_a_flat_one_goes_on():
    (steep,) = measured("steep", {"layer": [STEEP]}, (4,))
    (flat,) = measured("flat", {"layer": [FLAT]}, (4,))
    assert steep["auto makes"] == 1 and steep["auto holds"] > 0.9999
    assert flat["auto makes"] == 2 and flat["auto holds"] == flat["held by passes"][1]
    for row in (steep, flat):
        held = row["held by passes"]
        assert all(later > earlier - 1e-12 for earlier, later in itertools.pairwise(held))
        assert held[-1] <= 1 + 1e-12
        assert row["told too much"] == pytest.approx(
            max(told - held for told, held in zip(row["told by passes"], held, strict=True))
        )
    assert "| 2          |" in table([steep, flat]).splitlines()[-1]


def test_a_gradient_in_batches_is_their_mean():
    part = np.random.default_rng(0).standard_normal((100, 100))
    (row,) = measured("halves", {"layer": [STEEP + part, STEEP - part]}, (4,))
    (whole,) = measured("whole", {"layer": [STEEP]}, (4,))
    # What cancels is folded too, and is forgotten only as the sides are read again.
    assert row["held by passes"][0] < whole["held by passes"][0]
    assert row["held by passes"][-1] > 0.999


def test_the_worst_layer_counts_and_small_ones_are_left_out():
    (both,) = measured("model", {"steep": [STEEP], "flat": [FLAT], "small": [FLAT[:50]]}, (4,))
    (alone,) = measured("model", {"flat": [FLAT]}, (4,))
    assert both["layers"] == 2
    assert both["held by passes"] == pytest.approx(alone["held by passes"])
    assert not list(measured("small", {"layer": [FLAT]}, (32,)))
