"""Why a new head is fitted first: what a random one says about the encoder."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.energy import shares_of_best
from benchmarks.heads import starts
from benchmarks.quality.tasks import word_order


@pytest.fixture(scope="module")
def shares():
    """The median over the last block's layers, by what the start reads."""
    small = {"batch_size": 8, "init_batches": 2, "targets": r"encoder\.encoder\.layer\.5\..*\.(query|key|value|dense)"}
    tasks = [replace(word_order(fit_head_on=count), **small) for count in (0, 512)]
    wanted, taken = starts(*tasks)
    return {label: np.median(list(shares_of_best(wanted, factors).values())) for label, factors in taken.items()}


def test_a_random_heads_gradient_is_not_the_fitted_ones(shares):
    """It holds less of it than the fitted head's own gradient on entirely different texts does."""
    assert shares["fitted head, the same batches"] == pytest.approx(1.0, abs=1e-4)
    assert shares["random head, the same batches"] < 0.6 * shares["fitted head, other batches"]
    assert shares["nothing: random directions"] < 0.02
