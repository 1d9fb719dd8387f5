"""Ranks by the gradients' spectra in a session whose layers are matrices."""

import numpy as np
import pytest

from lora_one.config import Config
from lora_one.core.ranks import allotted_ranks
from lora_one.errors import ConfigError, ZeroGradientWarning
from lora_one.initialization import initialize
from tests.arrays import best_rank, spectrum_matrix
from tests.test_initialization import RANK, MatrixSession

GRADIENTS = {
    "steep": spectrum_matrix(60, 40, 0.2 ** np.arange(20)),
    "flat": 1e-3
    * spectrum_matrix(60, 40, 0.9 ** np.arange(40), seed=1),  # the layers count alike, whatever their scales
    "wide": spectrum_matrix(30, 90, 0.7 ** np.arange(30), seed=2),
    "small": spectrum_matrix(5, 50, 0.9 ** np.arange(5), seed=3),  # of rank 5 at most
}
CONFIG = Config(rank=RANK, rank_max=12, oversample=28, gamma=1.0)  # at this width the sketch sees all


def energies(g) -> np.ndarray:
    """Return (S_i / S_1)^2 up to the largest rank."""
    s = np.linalg.svd(g, compute_uv=False)
    return (s[: CONFIG.rank_max] / s[0]) ** 2


def expected_ranks(gradients=GRADIENTS) -> dict[str, int]:
    prices = [sum(g.shape) for g in gradients.values()]
    ranks = allotted_ranks([energies(g).tolist() for g in gradients.values()], prices, RANK * sum(prices))
    return dict(zip(gradients, ranks, strict=True))


def started(config=CONFIG, gradients=GRADIENTS, modules=None, **options):
    session = MatrixSession(gradients, **options)
    session.layers = [layer._replace(module=(modules or {}).get(layer.name, "")) for layer in session.layers]
    return session, initialize(session, config, "numpy", 0.0)


@pytest.mark.parametrize("options", [{}, {"folds": False}, {"stacks_layers": True}], ids=str)
@pytest.mark.parametrize("gradient", ["sketch", "exact"])
def test_each_layer_starts_at_the_best_part_of_the_rank_that_its_spectrum_earns(gradient, options):
    config = Config.from_dict({**CONFIG.to_dict(), "gradient": gradient})
    session, report = started(config, **options)
    ranks = expected_ranks()
    assert {layer.name: layer.rank for layer in report.layers} == ranks
    assert ranks["flat"] > RANK > ranks["steep"]
    left = sum(sum(g.shape) * (RANK - ranks[name]) for name, g in GRADIENTS.items())
    assert 0 <= left < 100  # the least price of a layer that could have more
    for name, g in GRADIENTS.items():
        a, b = session.factors[name]
        assert (a.shape, b.shape) == ((ranks[name], g.shape[1]), (g.shape[0], ranks[name]))
        expected = -best_rank(g, ranks[name]) / np.linalg.norm(g, 2)
        np.testing.assert_allclose(b @ a, expected, atol=1e-6)
    for layer in report.layers:
        s = np.linalg.svd(GRADIENTS[layer.name], compute_uv=False)
        assert layer.energy == pytest.approx(np.sum(s[: layer.rank] ** 2) / np.sum(s**2), rel=1e-3)


def test_pairs_of_one_module_get_the_rank_that_they_earn_together():
    """Two pairs of a steep and a flat gradient earn what one layer with both spectra would."""
    session, report = started(modules={"steep": "experts", "flat": "experts"})
    ranks = {layer.name: layer.rank for layer in report.layers}
    steep, flat, wide, small = map(energies, GRADIENTS.values())
    expected = allotted_ranks([(steep + flat).tolist(), wide.tolist(), small.tolist()], [200, 120, 55], RANK * 375)
    assert [ranks["steep"], ranks["wide"], ranks["small"]] == expected
    assert ranks["flat"] == ranks["steep"] == len(session.factors["flat"].lora_A)


def test_a_layer_without_a_gradient_keeps_its_rank():
    others = {name: g for name, g in GRADIENTS.items() if name != "wide"}
    with pytest.warns(ZeroGradientWarning):
        session, report = started(gradients={**GRADIENTS, "wide": np.zeros((30, 90))})
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert ranks == {**expected_ranks(others), "wide": RANK}
    assert session.factors["wide"].lora_A.shape == (RANK, 90)


@pytest.mark.parametrize("value", [7, 0, 8.0, "auto", True])
def test_rank_max_is_a_whole_number_from_the_rank_on(value):
    with pytest.raises(ConfigError, match=r"rank_max must be an integer >= 8 \(the rank\) or None, got"):
        Config(rank=8, rank_max=value)
    assert Config(rank=8, rank_max=8).scaling == Config(rank=8).scaling
