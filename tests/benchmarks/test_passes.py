"""`benchmarks.passes`: what is told beside what is held, on spectra whose answers are known."""

import itertools

import numpy as np
import pytest

from benchmarks.passes import measured, table


def test_a_steep_spectrum_ends_after_four_passes_and_a_flat_one_when_it_holds_enough():
    rows = [
        *measured("steep", {"layer": np.diag(0.5 ** np.arange(100))}, (4,)),
        *measured("flat", {"layer": np.diag(np.linspace(1.0, 0.5, 100))}, (4,)),
    ]
    steep, flat = rows
    assert (steep["passes"], steep["needed"]) == (4, 4) and steep["held"] > 0.9999
    assert flat["passes"] >= flat["needed"] > 4 and flat["held"] >= 0.99
    assert all(later > earlier - 1e-12 for earlier, later in itertools.pairwise(flat["held by passes"]))
    assert f"| {flat['passes']}  " in table(rows).splitlines()[-1]


def test_the_worst_layer_counts_and_small_ones_are_left_out():
    steep, flat = np.diag(0.5 ** np.arange(100)), np.diag(np.linspace(1.0, 0.5, 100))
    (both,) = measured("model", {"steep": steep, "flat": flat, "small": flat[:50]}, (4,))
    (alone,) = measured("model", {"flat": flat}, (4,))
    assert both["layers"] == 2
    assert both["held by passes"] == pytest.approx(alone["held by passes"])
    assert not list(measured("small", {"layer": flat}, (32,)))
