"""The passes over a session whose layers are matrices, without a model; and where the warnings of `init` point."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

import lora_one
from lora_one import passes
from lora_one.backends.interface import Layer, PassResult
from lora_one.backends.numpy import ops
from lora_one.config import Config
from lora_one.core.alignment import captured_energy
from lora_one.core.factors import Factors
from lora_one.errors import ChangingBatchesWarning, GammaWarning, GradientError, ZeroGradientWarning
from lora_one.initialization import initialize
from lora_one.report import Report
from tests.arrays import spectrum_matrix

RANK = 4


class MatrixSession:
    """A session with a given G for each layer; it counts the passes and keeps the factors."""

    ops = ops

    def __init__(
        self, gradients: Mapping[str, np.ndarray], others_continue_to: int = 0, stacks_layers: bool = False
    ) -> None:
        self.gradients = gradients
        self.stacks_layers = stacks_layers
        self.others_continue_to = others_continue_to  # the number of passes that other processes make
        self.layers = [Layer(name, *g.shape, RANK, 1.0) for name, g in gradients.items()]
        self.factors: dict[str, Factors] = {}
        self.passes = 0

    def like(self, layer: str) -> np.ndarray:
        return self.gradients[layer]

    def sketch_pass(self, probes: Mapping[str, Any]) -> tuple[PassResult, dict[str, np.ndarray | None]]:
        self.passes += 1
        products = {name: _product(self.gradients[name], probe) for name, probe in probes.items()}
        return PassResult(1.0, 1), products

    def exact_pass(self, consume: Callable[[str, np.ndarray], None]) -> PassResult:
        for name, g in reversed(self.gradients.items()):
            if g.any():
                consume(name, g)
        return PassResult(1.0, 1)

    def all_agree(self, decision: bool) -> bool:
        return decision and self.passes >= self.others_continue_to

    def assign(self, layer: str, factors: Factors) -> None:
        self.factors[layer] = factors

    def peak_memory(self) -> None:
        return None


def _product(g: np.ndarray, probe: Any) -> np.ndarray | None:
    if not g.any():
        return None
    return g @ probe.factor.T if probe.side == "A" else probe.factor.T @ g


STEEP = spectrum_matrix(320, 240, 0.5 ** np.arange(100))
FLAT = spectrum_matrix(320, 240, 1.0 / (1.0 + 0.04 * np.arange(200)), seed=1)


def started(config: Config, **gradients: np.ndarray) -> tuple[MatrixSession, Report]:
    session = MatrixSession(gradients)
    report = initialize(session, config, "numpy", 0.0)
    assert session.passes == report.passes or config.gradient == "exact"
    return session, report


def share(session: MatrixSession, layer: str) -> float:
    """Return the share of the energy of the best rank-r part of G that lies in the factors, by LAPACK."""
    g = session.gradients[layer]
    best = np.sum(np.linalg.svd(g, compute_uv=False)[:RANK] ** 2)
    return float(captured_energy(ops, g, session.factors[layer])) * np.linalg.norm(g) ** 2 / best


def test_four_passes_are_made_where_they_are_enough():
    session, report = started(Config(rank=RANK), steep=STEEP)
    assert report.passes == 4 and share(session, "steep") > 0.9999


def test_passes_continue_while_another_process_needs_them():
    session = MatrixSession({"steep": STEEP}, others_continue_to=6)
    assert initialize(session, Config(rank=RANK), "numpy", 0.0).passes == 6
    last = MatrixSession({"steep": STEEP}, others_continue_to=12)
    assert initialize(last, Config(rank=RANK), "numpy", 0.0).passes == 12


def test_passes_continue_until_the_worst_layer_holds_enough():
    config = Config(rank=RANK)
    session, report = started(config, steep=STEEP, flat=FLAT)
    assert report.passes > 4
    assert min(layer.share_of_best for layer in report.layers) >= 0.99
    assert share(session, "flat") >= 0.99  # the truth, not what the report believes
    asked, fewer = (started(Config(rank=RANK, passes=report.passes - n), steep=STEEP, flat=FLAT) for n in (0, 1))
    assert min(layer.share_of_best for layer in fewer[1].layers) < 0.99
    for name, factors in session.factors.items():
        np.testing.assert_array_equal(factors.lora_A, asked[0].factors[name].lora_A)
        np.testing.assert_array_equal(factors.lora_B, asked[0].factors[name].lora_B)


def test_passes_end_at_twelve_whatever_the_layers_hold():
    _, report = started(Config(rank=RANK, oversample=0), flatter=spectrum_matrix(320, 240, np.linspace(1.0, 0.5, 200)))
    assert report.passes == 12
    assert min(layer.share_of_best for layer in report.layers) < 0.99


def test_a_layer_without_a_gradient_asks_for_no_more_passes():
    with pytest.warns(UserWarning, match="have no gradient"):
        _, report = started(Config(rank=RANK), steep=STEEP, dead=np.zeros((30, 20)))
    assert report.passes == 4 and report.plain_layers == ["dead"]


@pytest.mark.parametrize("passes", [2, 3, 5])
def test_a_number_of_passes_is_kept_to(passes):
    _, report = started(Config(rank=RANK, passes=passes), flat=FLAT)
    assert report.passes == passes


ALIKE = {
    "steep": STEEP,
    "wide": spectrum_matrix(240, 320, 0.8 ** np.arange(100), seed=2),
    "flat": FLAT,
    "small": spectrum_matrix(320, 240, 1e-20 * 0.9 ** np.arange(50), seed=3),  # on another scale
    "one direction": spectrum_matrix(320, 240, np.ones(1), seed=4),  # the others of its stack have more to find
    "dead": np.zeros((320, 240)),
}


@pytest.mark.parametrize("limit", [2**30, 2 * STEEP.nbytes, 0])
@pytest.mark.parametrize("gradient", ["sketch", "exact"])
def test_layers_in_stacks_get_what_they_get_alone(monkeypatch, gradient, limit):
    monkeypatch.setattr(passes, "STACK_BYTES", limit)
    config = Config(rank=RANK, gradient=gradient)
    with pytest.warns(ZeroGradientWarning):
        alone, report = started(config, **ALIKE)
    together = MatrixSession(ALIKE, stacks_layers=True)
    with pytest.warns(ZeroGradientWarning):
        report_of_stacks = initialize(together, config, "numpy", 0.0)
    assert report_of_stacks.passes == report.passes
    assert report_of_stacks.plain_layers == report.plain_layers == ["dead"]
    for name in ALIKE:
        got, want = (pair.lora_B @ pair.lora_A for pair in (together.factors[name], alone.factors[name]))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * np.abs(want).max())
    for got, want in zip(report_of_stacks.layers, report.layers, strict=True):
        assert got.gradient_norm == pytest.approx(want.gradient_norm, rel=1e-12)
        assert got.share_of_best == pytest.approx(want.share_of_best, rel=1e-9)


def test_only_the_worst_layer_is_decomposed_between_the_first_check_of_a_stack_and_the_last(monkeypatch):
    shapes: list[tuple[int, ...]] = []

    class Counting(type(ops)):
        def svd(self, x):
            shapes.append(x.shape)
            return super().svd(x)

        def svdvals(self, x):
            shapes.append(x.shape)
            return super().svdvals(x)

    monkeypatch.setattr(MatrixSession, "ops", Counting())
    session = MatrixSession({f"steep {i}": STEEP for i in range(5)} | {"flat": FLAT}, stacks_layers=True)
    report = initialize(session, Config(rank=RANK, oversample=0), "numpy", 0.0)
    assert 5 < report.passes < 12
    checks = [shapes[i : i + 4] for i in range(0, len(shapes), 4)]  # each decomposes four passes
    stacks = [all(len(shape) == 3 for shape in check) for check in checks]
    alone = [all(len(shape) == 2 for shape in check) for check in checks]
    assert stacks[0] and stacks[-1] and all(alone[1:-1]) and len(checks) == report.passes - 4 + 2


def test_the_layer_of_a_stack_whose_gradient_is_not_finite_is_named():
    broken = FLAT.copy()
    broken[3, 5], broken[7, 1] = np.nan, np.inf
    session = MatrixSession({"steep": STEEP, "broken": broken}, stacks_layers=True)
    with pytest.raises(GradientError, match=r"layer 'broken': its gradient in pass 1 has .* entries that are not"):
        initialize(session, Config(rank=RANK), "numpy", 0.0)


@pytest.mark.parametrize("warning", [ChangingBatchesWarning, ZeroGradientWarning, GammaWarning])
def test_a_warning_points_at_the_line_that_called_init(warning):
    """Their `stacklevel` counts the frames in between."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    if warning is ZeroGradientWarning:
        torch.nn.init.zeros_(base[1].weight)  # no gradient reaches the first layer
    growing = itertools.count() if warning is not ZeroGradientWarning else itertools.repeat(0)

    def loss_fn(model, batch):
        return (model(batch) - 1.0).square().mean() + next(growing)

    gradient = "exact" if warning is GammaWarning else "sketch"  # one pass, so that only the trials differ
    config = lora_one.Config(rank=2, targets=["0", "1"], gradient=gradient, gamma="auto")
    with pytest.warns(warning) as records:
        lora_one.init(base, [torch.randn(8, 6)], loss_fn, config)
    assert {record.filename for record in records if record.category is warning} == {__file__}
