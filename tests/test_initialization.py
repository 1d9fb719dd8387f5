"""The passes over a session whose layers are matrices, without a model; and where the warnings of `init` point."""

import itertools
from collections.abc import Callable, Mapping

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
from lora_one.core.fold import FoldState, fold
from lora_one.core.sides import Products, Sides
from lora_one.errors import ChangingBatchesWarning, GammaWarning, GradientError, ZeroGradientWarning
from lora_one.initialization import initialize
from lora_one.report import Report
from tests.arrays import spectrum_matrix

RANK = 4


class MatrixSession:
    """A session with a given G for each layer; it counts the passes and keeps the factors."""

    ops = ops

    def __init__(
        self,
        gradients: Mapping[str, np.ndarray],
        folds: bool = True,
        stacks_layers: bool = False,
        others_continue_to: int = 0,
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        self.gradients = gradients
        self.folds = folds
        self.stacks_layers = stacks_layers
        self.others_continue_to = others_continue_to  # the number of passes that other processes make
        self.hidden = hidden  # layers whose rows no code sees
        self.layers = [Layer(name, *g.shape, RANK, 1.0) for name, g in gradients.items()]
        self.factors: dict[str, Factors] = {}
        self.widths: list[dict[str, int]] = []  # of each pass

    @property
    def passes(self) -> int:
        return len(self.widths)

    def like(self, layer: str) -> np.ndarray:
        return self.gradients[layer]

    def fold_pass(self, states: dict[str, FoldState]) -> tuple[PassResult, dict[str, FoldState | None]]:
        self.widths.append({name: state.v.shape[1] for name, state in states.items()})
        folded = {
            name: fold(ops, state, self.gradients[name])
            if self.gradients[name].any() and name not in self.hidden
            else None
            for name, state in states.items()
        }
        return PassResult(1.0, 1, not_folded=self.hidden), folded

    def sides_pass(self, sides: Mapping[str, Sides]) -> tuple[PassResult, dict[str, Products | None]]:
        self.widths.append({name: of_layer.right.shape[1] for name, of_layer in sides.items()})
        products = {
            name: Products(g @ sides[name].right, g.T @ sides[name].left) if g.any() else None
            for name, g in self.gradients.items()
            if name in sides
        }
        return PassResult(1.0, 1), products

    def exact_pass(self, consume: Callable[[str, np.ndarray], None]) -> PassResult:
        for name, g in reversed(self.gradients.items()):
            if g.any():
                consume(name, g)
        return PassResult(1.0, 1)

    def all_agree(self, decision: bool) -> bool:
        return decision and self.passes >= self.others_continue_to

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        self.layers = [layer._replace(rank=ranks[layer.name]) for layer in self.layers]

    def assign(self, layer: str, factors: Factors) -> None:
        self.factors[layer] = factors

    def peak_memory(self) -> None:
        return None


STEEP = spectrum_matrix(320, 240, 0.5 ** np.arange(100))
FLAT = spectrum_matrix(320, 240, 1.0 / (1.0 + 0.04 * np.arange(200)), seed=1)
FLATTER = spectrum_matrix(320, 240, np.linspace(1.0, 0.5, 200), seed=1)


def started(config: Config, folds: bool = True, **gradients: np.ndarray) -> tuple[MatrixSession, Report]:
    session = MatrixSession(gradients, folds)
    report = initialize(session, config, "numpy", 0.0)
    assert session.passes == report.passes or config.gradient == "exact"
    return session, report


def share(session: MatrixSession, layer: str) -> float:
    """Return the share of the energy of the best rank-r part of G that lies in the factors, by LAPACK."""
    g = session.gradients[layer]
    best = np.sum(np.linalg.svd(g, compute_uv=False)[:RANK] ** 2)
    return float(captured_energy(ops, g, session.factors[layer])) * np.linalg.norm(g) ** 2 / best


FOLDS = pytest.mark.parametrize("folds", [True, False], ids=["folds", "sides alone"])


def test_one_pass_is_made_and_two_where_rows_are_not_seen():
    session, report = started(Config(rank=RANK), steep=STEEP, flat=FLAT)
    assert report.passes == 1 and session.widths == [{"steep": 20, "flat": 20}]
    assert share(session, "steep") > 0.9999 and share(session, "flat") > 0.95
    session, report = started(Config(rank=RANK), folds=False, steep=STEEP, flat=FLAT)
    assert report.passes == 2 and session.widths == [{"steep": 48, "flat": 48}, {"steep": 40, "flat": 40}]
    assert share(session, "steep") > 0.9999 and share(session, "flat") > 0.95


def test_layers_that_could_not_be_folded_get_two_passes_of_their_own():
    session = MatrixSession({"steep": STEEP, "flat": FLAT}, hidden=frozenset({"flat"}))
    report = initialize(session, Config(rank=RANK), "numpy", 0.0)
    assert report.passes == 3 and session.widths == [{"steep": 20, "flat": 20}, {"flat": 48}, {"flat": 40}]
    alone = started(Config(rank=RANK), folds=False, flat=FLAT)[0]
    np.testing.assert_allclose(session.factors["flat"].lora_A, alone.factors["flat"].lora_A, atol=1e-12)


@FOLDS
def test_each_further_pass_adds_to_what_the_factors_hold(folds):
    lacking = []
    for number in (2, 3, 4):
        session, report = started(Config(rank=RANK, passes=number), folds=folds, flat=FLAT)
        assert report.passes == number
        lacking.append(1.0 - share(session, "flat"))
        assert report.layers[0].share_of_best == pytest.approx(1.0 - lacking[-1], abs=lacking[-1] + 1e-3)
    assert lacking[2] < 0.7 * lacking[1] < 0.5 * lacking[0]


def test_auto_makes_the_second_pass_where_a_layer_holds_too_little():
    auto = Config(rank=RANK, passes="auto")
    assert started(auto, steep=STEEP)[1].passes == 1
    session, report = started(auto, steep=STEEP, flatter=FLATTER)
    assert report.passes == 2 and session.widths[1] == {"steep": 20, "flatter": 20}
    one = started(Config(rank=RANK), flatter=FLATTER)[1].layers[0]
    assert one.share_of_best < 0.95
    assert started(auto, folds=False, steep=STEEP)[1].passes == 2


def test_auto_makes_the_second_pass_while_another_process_needs_it():
    session = MatrixSession({"steep": STEEP}, others_continue_to=2)
    assert initialize(session, Config(rank=RANK, passes="auto"), "numpy", 0.0).passes == 2


@FOLDS
def test_a_layer_without_a_gradient_asks_for_no_more_passes(folds):
    with pytest.warns(UserWarning, match="have no gradient"):
        _, report = started(Config(rank=RANK, passes="auto"), folds=folds, steep=STEEP, dead=np.zeros((30, 20)))
    assert report.passes == (1 if folds else 2) and report.plain_layers == ["dead"]


@FOLDS
def test_a_layer_that_is_not_wider_than_the_state_is_known_whole(folds):
    small = spectrum_matrix(30, 18, np.linspace(1.0, 0.5, 18))
    session, report = started(Config(rank=RANK), folds=folds, small=small)
    assert share(session, "small") == pytest.approx(1.0, abs=1e-12)
    [layer] = report.layers
    assert layer.share_of_best == 1.0 and layer.gradient_norm_error == 0.0
    assert layer.gradient_norm == pytest.approx(np.linalg.norm(small), rel=1e-12)


ALIKE = {
    "steep": STEEP,
    "wide": spectrum_matrix(240, 320, 0.8 ** np.arange(100), seed=2),
    "flat": FLAT,
    "small": spectrum_matrix(320, 240, 1e-20 * 0.9 ** np.arange(50), seed=3),  # on another scale
    "one direction": spectrum_matrix(320, 240, np.ones(1), seed=4),  # the others of its stack have more to find
    "dead": np.zeros((320, 240)),
}


@pytest.mark.parametrize("limit", [2**30, 2 * STEEP.nbytes, 0])
@pytest.mark.parametrize(
    ("config", "folds"),
    [(Config(rank=RANK, passes=2), True), (Config(rank=RANK), False), (Config(rank=RANK, gradient="exact"), True)],
    ids=["folds", "sides alone", "exact"],
)
def test_layers_in_stacks_get_what_they_get_alone(monkeypatch, config, folds, limit):
    monkeypatch.setattr(passes, "STACK_BYTES", limit)
    with pytest.warns(ZeroGradientWarning):
        alone, report = started(config, folds, **ALIKE)
    together = MatrixSession(ALIKE, folds, stacks_layers=True)
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


def test_the_layer_of_a_stack_whose_gradient_is_not_finite_is_named():
    broken = FLAT.copy()
    broken[3, 5], broken[7, 1] = np.nan, np.inf
    session = MatrixSession({"steep": STEEP, "broken": broken}, folds=False, stacks_layers=True)
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

    number = 1 if warning is GammaWarning else 2  # one pass, so that only the trials differ
    config = lora_one.Config(rank=2, targets=["0", "1"], passes=number, gamma="auto")
    with pytest.warns(warning) as records:
        lora_one.init(base, [torch.randn(8, 6)], loss_fn, config)
    assert {record.filename for record in records if record.category is warning} == {__file__}
