"""What the runs of a contender come to. Needs no framework."""

from collections.abc import Sequence
from typing import NamedTuple

from .protocol import tested
from .results import Interval, Row, best_rate, interval, select, steps_to_reach

FIRST = 20  # steps whose mean loss tells the start
LAST = 10  # steps whose mean loss is the final one


class Summary(NamedTuple):
    """A contender at its rate."""

    name: str
    rate: float
    score: Interval
    test_loss: Interval
    first: Interval  # mean loss of the first steps
    steps: list[int | None]  # a seed: steps to LoRA's final loss
    seconds_init: float
    seconds_train: float
    rows: list[Row]  # the runs at this rate, by seed


def summarize(name: str, runs: Sequence[Row], reference: Summary | None = None) -> Summary | None:
    """The summary of a contender's runs at its rate; None if there are none.

    Args:
        reference: LoRA's, whose final training loss of the same seed is the goal of `steps`.
    """
    if not runs:
        return None
    runs = sorted(runs, key=lambda row: row["seed"])
    goals = {row["seed"]: final_loss(row) for row in (reference.rows if reference else runs)}
    return Summary(
        name=name,
        rate=runs[0]["rate"],
        score=interval([row["score"] for row in runs]),
        test_loss=interval([row["test_loss"] for row in runs]),
        first=interval([first_loss(row) for row in runs]),
        steps=[steps_to_reach(row["losses"], goals[row["seed"]]) for row in runs if row["seed"] in goals],
        seconds_init=mean(runs, "seconds_init"),
        seconds_train=mean(runs, "seconds_train"),
        rows=list(runs),
    )


def by_protocol(rows: Sequence[Row], task: str, rank: int, names: Sequence[str]) -> dict[str, Summary]:
    """Name -> summary of the test seeds, of the contenders whose cell is complete."""
    reference = summarize("LoRA", tested(rows, task, "LoRA", rank))
    found = {name: summarize(name, tested(rows, task, name, rank), reference) for name in names}
    return {name: summary for name, summary in found.items() if summary}


def at_best_rate(rows: Sequence[Row], task: str, name: str, rank: int) -> Summary | None:
    """The summary of a smaller comparison: the rate is the best at seed 0, and all seeds at it count."""
    mine = select(rows, task=task, group="main", contender=name, rank=rank)
    if not select(mine, seed=0):
        return None
    return summarize(name, select(mine, rate=best_rate(mine)))


def final_loss(row: Row) -> float:
    """The mean training loss of the last steps."""
    return sum(row["losses"][-LAST:]) / LAST


def first_loss(row: Row) -> float:
    """The mean training loss of the first steps."""
    return sum(row["losses"][:FIRST]) / FIRST


def mean(runs: Sequence[Row], measure: str) -> float:
    """The mean of a measure over runs."""
    return sum(row[measure] for row in runs) / len(runs)


def paired(ones: Sequence[Row], others: Sequence[Row], measure: str, comparisons: int = 1) -> Interval | None:
    """The difference of a measure, one - other, by seed; None without two seeds that both have.

    Args:
        comparisons: of `interval`.
    """
    theirs = {row["seed"]: row[measure] for row in others}
    differences = [row[measure] - theirs[row["seed"]] for row in ones if row["seed"] in theirs]
    return interval(differences, comparisons) if len(differences) > 1 else None
