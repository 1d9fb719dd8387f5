"""The update rules against their formulas, and the sweep that runs them."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.preconditioner import sweep
from benchmarks.preconditioner.optimizer import RuleOptimizer
from benchmarks.preconditioner.report import DOCS, beating_plain, finals, make_page, pairs_table, write
from benchmarks.preconditioner.rules import Rule, start, step
from benchmarks.preconditioner.sweep import Cell, OutOfTime, Results, climb, tune
from benchmarks.preconditioner.tasks import RANK, TASKS, make_task
from benchmarks.preconditioner.training import train
from lora_one.backends.numpy import ops
from lora_one.backends.torch.optimizer import LoraPair
from lora_one.core import step as core
from lora_one.core.factors import Factors

RATE = 1e-2


def pair(seed: int, *batch: int) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(rng.standard_normal((*batch, 3, 7)), rng.standard_normal((*batch, 5, 3)))


def follow(rule: Rule, first: Factors, gradients: list[Factors]) -> Factors:
    state = start(ops, first)
    for gradient in gradients:
        first, state = step(ops, rule, first, gradient, state, RATE)
    return first


def assert_close(got: Factors, expected: Factors) -> None:
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


GRADIENTS = [pair(100 + i) for i in range(5)]


@pytest.mark.parametrize("rule", [Rule("adam"), Rule("adam", "before", "absolute", 1e-2),
                                  Rule("adam", "before", "relative", 1e-2)])  # fmt: skip
def test_plain_and_before_are_cores_adamw(rule):
    expected, state = pair(0), core.start_pair(ops, pair(0))
    reg = None if rule.place == "none" else rule.reg
    for g in GRADIENTS:
        expected, state = core.adamw(ops, expected, g, state, RATE, reg=reg, damping=rule.damping)
    assert_close(follow(rule, pair(0), GRADIENTS), expected)


@pytest.mark.parametrize("place", ["none", "before", "after"])
def test_momentum_is_torchs_sgd(place):
    """`before` feeds it preconditioned gradients; `after` preconditions the steps that it would make."""
    a, b = (torch.tensor(x, requires_grad=True) for x in pair(0))
    sgd = torch.optim.SGD([a, b], lr=RATE, momentum=0.9)
    for g in GRADIENTS:
        old = Factors(a.detach().numpy().copy(), b.detach().numpy().copy())
        a.grad, b.grad = (torch.tensor(x) for x in (times(old, g, 0.1) if place == "before" else g))
        sgd.step()
        if place == "after":
            moved = times(old, Factors(a.detach().numpy() - old.lora_A, b.detach().numpy() - old.lora_B), 0.1)
            with torch.no_grad():
                a.copy_(torch.tensor(old.lora_A + moved.lora_A))
                b.copy_(torch.tensor(old.lora_B + moved.lora_B))
    reg = 0.0 if place == "none" else 0.1
    got = follow(Rule("momentum", place, "absolute", reg), pair(0), GRADIENTS)
    assert_close(got, Factors(a.detach().numpy(), b.detach().numpy()))


def times(p: Factors, g: Factors, reg: float, power: float = 1.0) -> Factors:
    """P^power g, by eigenvalues."""

    def inverse(gram):
        s, u = np.linalg.eigh(gram)
        return (u * (s + reg) ** -power) @ u.T

    return Factors(inverse(p.lora_B.T @ p.lora_B) @ g.lora_A, g.lora_B @ inverse(p.lora_A @ p.lora_A.T))


@pytest.mark.parametrize("place", ["mean", "after", "basis"])
def test_the_other_places_of_the_preconditioner_are_their_formulas(place):
    reg, p = 0.1, pair(0)
    m = v = Factors(np.zeros((3, 7)), np.zeros((5, 3)))
    for t, g in enumerate(GRADIENTS, 1):
        squared = times(p, g, reg, 0.5) if place == "basis" else g
        m = Factors(*(0.9 * x + 0.1 * y for x, y in zip(m, g, strict=True)))
        v = Factors(*(0.999 * x + 0.001 * y**2 for x, y in zip(v, squared, strict=True)))
        m_hat, v_hat = (Factors(*(x / (1 - c**t) for x in z)) for z, c in ((m, 0.9), (v, 0.999)))
        if place == "mean":
            m_hat = times(p, m_hat, reg)
        if place == "basis":
            m_hat = times(p, m_hat, reg, 0.5)
        direction = Factors(*(x / (np.sqrt(y) + 1e-8) for x, y in zip(m_hat, v_hat, strict=True)))
        if place == "after":
            direction = times(p, direction, reg)
        if place == "basis":
            direction = times(p, direction, reg, 0.5)
        p = Factors(*(x - RATE * d for x, d in zip(p, direction, strict=True)))
    assert_close(follow(Rule("adam", place, "absolute", reg), pair(0), GRADIENTS), p)


@pytest.mark.parametrize("place", ["before", "mean", "after", "basis"])
def test_pairs_of_a_model_step_as_one_by_one(place):
    rule = Rule("adam", place, "relative", 1e-2)
    pairs = [LoraPair(*(torch.nn.Parameter(torch.tensor(x)) for x in pair(i))) for i in range(2)]
    optimizer = RuleOptimizer(pairs, rule)
    for i in range(3):
        for k, p in enumerate(pairs):
            p.lora_A.grad, p.lora_B.grad = (torch.tensor(x) for x in pair(10 * i + k + 50))
        optimizer.step(RATE)
    for k, p in enumerate(pairs):
        assert p.lora_A.grad is None
        got = Factors(p.lora_A.detach().numpy(), p.lora_B.detach().numpy())
        assert_close(got, follow(rule, pair(k), [pair(10 * i + k + 50) for i in range(3)]))


def test_climb_ends_below_both_neighbours_and_leaves_what_diverged():
    assert climb(lambda k: (k - 3) ** 2, -4) == 3
    assert climb(lambda k: math.inf if k > -2 else -k, 3) == -2
    assert climb(lambda k: -k, 0, span=5) == 5  # no minimum: it gives up


def test_a_sweep_makes_each_run_once_and_goes_on_from_its_file(tmp_path, monkeypatch):
    made = []

    def run(job, task, rank, rule, rate, seed):
        made.append(rate)
        keys = ("job", "task", "rank", "optimizer", "place", "damping", "reg", "rate", "seed")
        row = (job, task, rank, rule.optimizer, rule.place, rule.damping, rule.reg, rate, seed)
        return dict(zip(keys, row, strict=True)) | {"loss": abs(math.log10(rate) + 1.5)}

    monkeypatch.setattr(sweep, "run", run)
    cell, path = Cell("screen", "main", 8, Rule("adam")), tmp_path / "rows.json"
    assert tune(Results(path), cell, 1e-3, per_decade=2)["rate"] == 0.0316
    assert len(made) == len(set(made)) == 6  # 3e-4, and from 1e-3 up to the first that is worse
    again = Results(path)
    assert tune(again, cell, 1e-3, per_decade=2)["rate"] == again.best(cell)["rate"] == 0.0316
    assert len(made) == 6
    assert [row["rate"] for row in json.loads(path.read_text())] == made
    with pytest.raises(OutOfTime):
        Results(path, deadline=0.0).get(cell, 0.1234)


@pytest.mark.parametrize("name", ["linear", "relu"])
def test_in_the_theorys_setting_preconditioned_momentum_is_far_ahead(name):
    """Condition number 100, from the gradient: at the better of two rates, two decades apart in what they leave."""
    task = make_task(name, 4, 0, 0)
    loss = {}
    for rule, rates in (
        (Rule("momentum"), (0.03, 0.1)),
        (Rule("momentum", "before", "absolute", 1e-4), (3e-4, 1e-3)),
    ):
        found = [train(task, rule, rate, 200) for rate in rates]
        assert found[0][0] == found[1][0]  # the same start
        loss[rule.place] = min(losses[-1] for losses in found)
    assert loss["before"] < 1e-2 * loss["none"]


def test_the_verdict_asks_for_every_task(tmp_path):
    """A rule that is ahead on four of the five tasks is not ahead."""

    def row(place, task, rate, loss):
        job = "screen" if task in ("main", "harder") else "full"
        rule = {"optimizer": "adam", "place": place, "damping": "absolute", "reg": 0.0 if place == "none" else 1e-2}
        return {"job": job, "task": task, "rank": RANK[task], "rate": rate, "seed": 0, "loss": loss} | rule

    rows = [row("none", task, rate, loss) for task in TASKS for rate, loss in ((1e-3, 0.9), (3e-3, 0.5), (1e-2, None))]
    rows += [row("basis", task, 1e-3, 0.4) for task in TASKS]
    rows += [row("before", task, 1e-3, 0.4) for task in TASKS[:4]] + [row("before", TASKS[4], 1e-3, 0.6)]
    rows += [row("after", task, 1e-3, 0.4) for task in TASKS[:4]]  # the last was not run
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert beating_plain(Results(path), "adam") == [Rule("adam", "basis", "absolute", 1e-2)]
    (tmp_path / "evidence").mkdir()
    (tmp_path / "images").mkdir()
    write(Results(path), tmp_path)
    page = (tmp_path / "evidence" / "preconditioner.md").read_text()
    assert "**Ahead of plain Adam on every task: basis, absolute 0.01.**" in page
    assert "it should be what `lora_one.optimizer` does by default" in page
    # absolute 0.01, of every place: 0.4 over plain's 0.5, and before's 0.6 on the last
    assert "| Adam: before" + " | 0.8 (1 of 1)" * 4 + " | 1.2 (0 of 1) |" in page
    assert "| Adam: after" + " | 0.8 (1 of 1)" * 4 + " |  |" in page
    assert "| none" + " | 0.5 (0.003)" * 5 + " |" in page
    assert "| before, absolute 0.01" + " | **0.4** (0.001)" * 4 + " | 0.6 (0.001) |" in page


def test_the_committed_page_is_that_of_the_committed_rows():
    assert (DOCS / "evidence" / "preconditioner.md").read_text(encoding="utf-8") == make_page(Results())


def test_seeds_are_compared_within_task_and_seed(tmp_path):
    """Two tasks of two seeds: a rule's losses over plain's are 1/2, 2, 1/4, 1, at the end; a third at the start."""
    numbers = {"main": ((0.2, 0.1), (0.2, 0.4)), "harder": ((0.4, 0.1), (0.3, 0.3))}
    rows = []
    for task, seeds in numbers.items():
        for seed, losses in enumerate(seeds):
            for place, loss, first in zip(("none", "basis"), losses, (3.0, 1.0), strict=True):
                rule = {"optimizer": "adam", "place": place, "damping": "relative", "reg": float(place == "basis")}
                rule |= {"damping": "absolute"} if place == "none" else {}
                at = {"job": "full", "task": task, "rank": 4, "rate": 1e-3, "seed": seed}
                rows.append(at | rule | {"loss": loss, "loss_first_20": first, "exact_match": 0.5})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    results = Results(path)
    found = finals(results) + pairs_table(results)
    assert "| full | main | 4 | none | 0.001 (edge) | 2 | 0.200 ± 0.000 |  | 50.0 ± 0.0 |" in found
    assert "| full | main | 4 | basis, relative 1 | 0.001 (edge) | 2 | 0.250 ± 0.212 | 1 of 2 | 50.0 ± 0.0 |" in found
    assert "| full | 4 | basis, relative 1 | 4 | 2 | 0.71 | 0.33 |" in found  # (1/2 x 2 x 1/4 x 1)^(1/4)
