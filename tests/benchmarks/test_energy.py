"""`benchmarks.energy`: each way of making a start does what its name says, on the embedded Llama."""

import numpy as np
import pytest

from benchmarks.energy import Way, exact_gradients, measured, problem, ways


@pytest.fixture(scope="module")
def given():
    whole = problem("sort")
    return whole._replace(batches=whole.batches[:4], targets=r".*layers\.[01]\..*(q_proj|down_proj)")


def test_ways_hold_what_they_should_and_tell_no_more(given):
    gradients = exact_gradients(*given)
    energies = {name: np.linalg.svd(g, compute_uv=False) ** 2 for name, g in gradients.items()}
    assert len(gradients) == 4
    for way, passes, least in (
        (Way(1), 1, 0.99),
        (Way(2), 2, 0.999),
        (Way(1, folds=False), 2, 0.99),  # the least that sides alone can do with
        (Way(1, processes=2), 1, 0.98),
        (Way(2, processes=4), 2, 0.99),
    ):
        row = measured(given, way, gradients, energies)
        assert row["made"] == passes, way
        assert least < row["worst"] <= row["median"] <= 1 + 1e-6, way
        assert row["told_too_much"] < 0.01, way


def test_no_way_comes_twice():
    assert len(set(ways())) == len(list(ways()))
