"""The search for a loss scale, run on vectors that are rounded to float16 as a backward pass would round them."""

import math

import numpy as np
import pytest

from lora_one.core.loss_scale import UNSCALED, Limits, begin, error_above

LIMITS = Limits(first=2.0**15, least=2.0**-5, down=2.0**-4, enough=2.0**-11, raises=4, small_room=2.0**3)


def run(gradient, limits=LIMITS):
    """The settled search, and how many passes it took."""
    search, passes = begin(limits), 0
    while not search.is_settled:
        passes += 1
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = (gradient * search.value).astype(np.float16).astype(np.float64)
            error = np.linalg.norm(rounded / search.value - gradient) / np.linalg.norm(gradient)
        if not np.isfinite(rounded).all() and search.can_fall:
            search = search.after_overflow()
            continue
        search = search.after_finite(error, 2.0**11 / np.abs(rounded).max() if rounded.any() else 2.0**10)
    return search, passes


@pytest.mark.parametrize("size", [2.0**exponent for exponent in (-50, -40, -30, -15, 0, 4)])
def test_the_scale_is_one_at_which_float16_keeps_its_digits(size):
    gradient = size * np.random.default_rng(0).standard_normal(100)
    search, passes = run(gradient)
    rounded = (gradient * search.value).astype(np.float16).astype(np.float64) / search.value
    np.testing.assert_allclose(rounded, gradient, rtol=2.0**-10, atol=2.0**-9 * size)
    assert passes <= 6
    assert math.log2(search.value).is_integer()


def test_it_falls_no_further_than_the_least_and_never_rises_after_an_overflow():
    search, passes = run(np.full(3, np.inf))
    assert search.value == 2.0**-5 and passes == 6
    fallen = begin(LIMITS).after_overflow()
    assert fallen.after_finite(1.0, 2.0**10) == fallen._replace(is_settled=True)


def test_it_rises_by_whole_powers_within_the_room():
    search = begin(LIMITS)
    assert search.after_finite(1.0, 2.0**9 * 1.9).value == 2.0**24
    assert search.after_finite(1.0, 2.0**3).is_settled  # too little room to be worth a pass
    assert search.after_finite(2.0**-11, 2.0**9).is_settled


def test_without_float16_there_is_nothing_to_search():
    assert begin(UNSCALED).is_settled and begin(UNSCALED).value == 1.0 and not begin(UNSCALED).can_fall


def test_rounding_errors_are_absolute():
    """A gradient 16 times as large in float16's subnormal range has about a 16th of the relative error."""
    gradient = np.random.default_rng(0).uniform(1.0, 2.0, 4096) * 2.0**-20

    def error(scale):
        return np.linalg.norm((gradient * scale).astype(np.float16).astype(np.float64) / scale - gradient)

    assert error_above(error(1.0), 16.0) == pytest.approx(error(16.0), rel=0.1)
