"""Which runs are made, and in which order: short jobs first, then each place's best damping at length."""

import math
from collections.abc import Iterable

from .rules import Rule
from .sweep import Cell, Results, loss_of, tune
from .tasks import LLAMA, RANK, REGRESSION

COARSE = {"absolute": (1e-6, 1e-2), "relative": (1e-2, 1.0)}
DAMPINGS = {"absolute": (1e-6, 1e-4, 1e-2, 1.0), "relative": (1e-4, 1e-2, 1.0, 1e2)}  # six decades each
PLACES = {"adam": ("before", "mean", "after", "basis"), "momentum": ("before", "after")}
# Where the first climb begins.
FIRST_RATE = {
    "adam": {"none": 3e-3, "before": 3e-3, "mean": 3e-5, "after": 3e-5, "basis": 3e-4},
    "momentum": {"none": 1e-1, "before": 1e-3, "after": 1e-3},
}
SEEDS = (0, 1, 2)
RANKS = (8, 4, 32)  # in which the full job is made


def carry_out(results: Results) -> None:
    """Make all runs that are not there yet, in the order in which they tell most."""
    for dampings in (COARSE, DAMPINGS):
        screen(results, "screen", LLAMA, rules("adam", dampings))
        for task in LLAMA:
            confirm(results, "screen", task, RANK[task], places=2)
        for rank in RANKS:
            for task in LLAMA:
                confirm(results, "full", task, rank, places=1)
        for optimizer in PLACES:
            screen(results, "full", REGRESSION, rules(optimizer, dampings))
        for rank in (4, 32):
            screen(results, "screen", LLAMA, finalists(results, "adam", "screen", LLAMA)[:3], rank)
        screen(results, "screen", LLAMA, rules("momentum", dampings))
    for optimizer in PLACES:
        for rank in (4, 32):
            screen(results, "screen", LLAMA, finalists(results, optimizer, "screen", LLAMA), rank)
        for rank in (4, 8, 32):
            screen(results, "full", REGRESSION, finalists(results, optimizer, "full", REGRESSION), rank)


def rules(optimizer: str, dampings: dict[str, tuple[float, ...]]) -> list[Rule]:
    """The plain optimizer, and each place with each damping."""
    found = [Rule(optimizer)]  # type: ignore[arg-type]
    for place in PLACES[optimizer]:
        for damping, regs in dampings.items():
            found += [Rule(optimizer, place, damping, reg) for reg in regs]  # type: ignore[arg-type]
    return found


def screen(results: Results, job: str, tasks: Iterable[str], chosen: list[Rule], rank: int | None = None) -> None:
    """Each rule at its best rate in half decades, one seed, at each task's own rank or at the one given.

    A climb begins at the rule's best rate on the task before, or else at that of the rule before it of the same place.
    """
    known: dict[Rule | str, float] = {}
    for task in tasks:
        for rule in chosen:
            first = known.get(rule, known.get(rule.place, FIRST_RATE[rule.optimizer][rule.place]))
            best = tune(results, Cell(job, task, rank or RANK[task], rule), first, per_decade=2)["rate"]
            known[rule] = known[rule.place] = best


def finalists(results: Results, optimizer: str, job: str, tasks: Iterable[str]) -> list[Rule]:
    """The plain optimizer, then of each place its best damping, best first: by the mean log loss over the tasks."""

    def loss(rule: Rule) -> float:
        rows = [results.best(Cell(job, task, RANK[task], rule)) for task in tasks]
        return sum(math.inf if row is None else math.log(loss_of(row)) for row in rows)

    plain, *others = rules(optimizer, DAMPINGS)
    best = [min((rule for rule in others if rule.place == place), key=loss) for place in PLACES[optimizer]]
    return [plain, *sorted(best, key=loss)]


def confirm(results: Results, job: str, task: str, rank: int, places: int) -> None:
    """Plain Adam and the best places: the best rate in quarter decades by one seed, then the other seeds at it."""
    rates: dict[Rule, float] = {}
    for rule in finalists(results, "adam", "screen", LLAMA)[: 1 + places]:
        short = results.best(Cell("screen", task, RANK[task], rule))
        assert short is not None
        rates[rule] = tune(results, Cell(job, task, rank, rule), short["rate"], per_decade=4)["rate"]
    for seed in SEEDS[1:]:  # outermost: a seed is another start
        for rule, rate in rates.items():
            results.get(Cell(job, task, rank, rule, seed), rate)
