"""What `Config.balance` must make of the net of `adaptive` on every framework, with batches and without."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import lora_one
from tests.arrays import best_rank
from tests.backends import adaptive

RANK, GAMMA, STEPS = adaptive.CONFIG.rank, adaptive.CONFIG.gamma, 6
BALANCES = (0.0, 0.25, 0.5)
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # layer -> lora_A, (r, in), and lora_B, (out, r)


def options(balance: float) -> dict:
    """Return the settings that differ from adaptive.CONFIG's."""
    return {"balance": balance, "rank_max": None}


def config(balance: float) -> lora_one.Config:
    """Return all settings."""
    return replace(adaptive.CONFIG, **options(balance))


def assert_started_without_data(run: Callable[[float], tuple[Pairs, Any]], balance: float) -> None:
    """Check the start of the first steps.

    Args:
        run: balance -> the pairs after STEPS steps of a start, and the report of it.
    """
    pairs, report = run(balance)
    for layer in report.layers:
        if layer.name != "narrow":  # a gradient of rank 1
            assert_shared(pairs[layer.name], layer.singular_values, balance)
    assert_same_products(pairs, run(0.5)[0])


def assert_started(pairs: Pairs, balance: float) -> None:
    """Check a start from the batches against the SVD of the net's gradients in float64."""
    for name, g in adaptive.gradients().items():
        s = np.linalg.svd(g, compute_uv=False)[:RANK]
        if name != "narrow" or balance != 0.25:  # rounding in a zero of its S, to the fourth root
            assert_shared(pairs[name], s / s[0], balance)
        product = pairs[name][1] @ pairs[name][0]
        expected = -best_rank(g, RANK) / s[0] / GAMMA
        np.testing.assert_allclose(product, expected, atol=1e-4 * np.abs(expected).max())


def assert_same_products(pairs: Pairs, others: Pairs) -> None:
    """Check that two starts have one product; that of rank 1 keeps two more directions, of 1/1000 at most."""
    for name, (a, b) in pairs.items():
        expected = others[name][1] @ others[name][0]
        np.testing.assert_allclose(b @ a, expected, atol=(4e-3 if name == "narrow" else 1e-4) * np.abs(expected).max())


def assert_shared(pair: tuple[np.ndarray, np.ndarray], ratios: Any, balance: float) -> None:
    """Check the lengths of A's rows and B's columns: r^(1/2 - p) (S_i / S_1)^p / sqrt(gamma), and what is left."""
    (a, b), ratios = pair, np.asarray(ratios)
    rows = RANK ** (0.5 - balance) * ratios**balance / GAMMA**0.5
    columns = ratios / GAMMA / (RANK ** (0.5 - balance) * np.where(ratios > 0, ratios, 1.0) ** balance / GAMMA**0.5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), rows, atol=2e-3 * rows[0])
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), columns, atol=2e-3 * columns[0])
