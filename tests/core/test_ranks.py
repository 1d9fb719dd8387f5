"""Ranks for a number of parameters, against all possible choices; and the part of a spectrum of a smaller rank."""

import itertools

import numpy as np
import pytest

from lora_one.backends.numpy import ops
from lora_one.core.exact import exact_spectrum
from lora_one.core.fold import finish_fold, fold, start_fold
from lora_one.core.omega import draw_omega
from lora_one.core.ranks import allotted_ranks
from lora_one.core.spectrum import leading
from tests.arrays import spectrum_matrix


def drawn(seed: int) -> tuple[list[list[int]], list[int]]:
    """Return whole values of the directions of 4 layers, up to 4 each, with ties and zeros; and prices."""
    rng = np.random.default_rng(seed)
    values = [sorted(rng.integers(0, 12, rng.integers(1, 5)).tolist(), reverse=True) for _ in range(4)]
    return values, rng.integers(2, 9, 4).tolist()


def worth(values, ranks) -> int:
    return sum(sum(of_layer[:rank]) for of_layer, rank in zip(values, ranks, strict=True))


def most(values, prices, budget) -> int:
    """Return the largest value of all ranks that the budget pays for."""
    choices = itertools.product(*(range(1, len(of_layer) + 1) for of_layer in values))
    return max(worth(values, ranks) for ranks in choices if np.dot(ranks, prices) <= budget)


@pytest.mark.parametrize("seed", range(8))
def test_with_equal_prices_no_other_ranks_hold_more(seed):
    values, _ = drawn(seed)
    for budget in range(4 * 5, 16 * 5, 3):
        ranks = allotted_ranks(values, [5] * 4, budget)
        assert 5 * sum(ranks) <= budget
        assert worth(values, ranks) == most(values, [5] * 4, budget)


@pytest.mark.parametrize("seed", range(8))
def test_with_unlike_prices_less_than_one_more_direction_is_missing(seed):
    values, prices = drawn(seed)
    for budget in range(sum(prices), 4 * sum(prices), 5):
        ranks = allotted_ranks(values, prices, budget)
        left = budget - np.dot(ranks, prices)
        unbought = [(v, price) for of_layer, rank, price in zip(values, ranks, prices, strict=True)
                    for v in of_layer[rank:] if v > 0]  # fmt: skip
        assert left >= 0
        assert all(price > left for _, price in unbought)
        assert most(values, prices, budget) - worth(values, ranks) <= max([v for v, _ in unbought], default=0)


def test_ties_go_to_the_first_layers_and_what_is_worth_nothing_is_not_bought():
    assert allotted_ranks([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [1, 1, 1], 4) == [2, 1, 1]
    assert allotted_ranks([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [1, 1, 1], 9) == [2, 2, 1]


def test_a_budget_below_rank_1_everywhere_is_an_error():
    with pytest.raises(ValueError, match="must be >= 12, the price of rank 1 in all layers, got 11"):
        allotted_ranks([[1.0], [1.0]], [5, 7], 11)


def test_the_part_of_an_exact_spectrum_is_the_spectrum_of_that_rank(arrays):
    scale = 1e-25  # squares of it are zero in float32
    g = arrays.of(scale * spectrum_matrix(30, 20, 3.0 / np.arange(1, 21)))
    part, expected = leading(arrays.ops, exact_spectrum(arrays.ops, g, 10), 4), exact_spectrum(arrays.ops, g, 4)
    for field, ours, theirs in zip(expected._fields, part, expected, strict=True):
        scaled = scale if field in ("s", "norm", "norm_error", "unseen", "best_norm") else 1.0
        arrays.assert_close(arrays.numpy(ours) / scaled, arrays.numpy(theirs) / scaled)


def test_the_part_misses_at_most_what_the_whole_misses():
    """best^2 - held^2 is the estimate of the energy that was missed; the truth is below it here for both ranks."""
    g = spectrum_matrix(60, 50, 0.8 ** np.arange(40))
    omega, test = draw_omega(0, "", 50, 12), draw_omega(0, "test", 50, 8)
    whole = finish_fold(ops, fold(ops, start_fold(ops, omega, 60, test), g), 10)
    part = leading(ops, whole, 4)

    def missed(spectrum) -> float:
        return float(spectrum.best_norm**2 - np.sum(spectrum.s**2))

    truth = np.sum(np.linalg.svd(g, compute_uv=False)[:4] ** 2) - np.sum(part.s**2)
    assert missed(part) == pytest.approx(missed(whole), rel=1e-9)
    assert truth <= missed(part)
