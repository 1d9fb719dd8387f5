"""What the rows of a contender come to. Needs no framework."""

from collections.abc import Sequence
from typing import NamedTuple

from .results import Interval, Row, best_rate, interval, missing_edge, select, steps_to_reach

FIRST = 20  # steps whose mean loss tells the start
LAST = 10  # steps whose mean loss is the final one


class Summary(NamedTuple):
    """A contender at its best rate."""

    name: str
    rate: float
    swept: int  # rates tried
    edge: bool  # the sweep ended at its best: a better rate may lie beyond
    score: Interval
    test_loss: Interval
    first: Interval  # mean loss of the first steps
    steps: list[int | None]  # a seed: steps to LoRA's final loss
    seconds_init: float
    seconds_train: float
    rows: list[Row]  # the runs at the best rate, by seed


def summarize(rows: Sequence[Row], task: str, name: str, rank: int, reference: "Summary | None") -> Summary | None:
    """The summary of a contender; None if it has no runs.

    Args:
        reference: LoRA's, whose final training loss of the same seed is the goal of `steps`.
    """
    mine = select(rows, task=task, group="main", contender=name, rank=rank)
    if not select(mine, seed=0):
        return None
    rate = best_rate(mine)
    best = sorted(select(mine, rate=rate), key=lambda row: row["seed"])
    goals = {row["seed"]: final_loss(row) for row in (reference.rows if reference else best)}
    return Summary(
        name=name,
        rate=rate,
        swept=len({row["rate"] for row in mine}),
        edge=missing_edge(mine) is not None,
        score=interval([row["score"] for row in best]),
        test_loss=interval([row["test_loss"] for row in best]),
        first=interval([sum(row["losses"][:FIRST]) / FIRST for row in best]),
        steps=[steps_to_reach(row["losses"], goals[row["seed"]]) for row in best if row["seed"] in goals],
        seconds_init=sum(row["seconds_init"] for row in best) / len(best),
        seconds_train=sum(row["seconds_train"] for row in best) / len(best),
        rows=best,
    )


def final_loss(row: Row) -> float:
    """The mean training loss of the last steps."""
    return sum(row["losses"][-LAST:]) / LAST


def paired(ones: Sequence[Row], others: Sequence[Row], measure: str) -> Interval | None:
    """The difference of a measure, one - other, by seed; None without two seeds that both have."""
    theirs = {row["seed"]: row[measure] for row in others}
    differences = [row[measure] - theirs[row["seed"]] for row in ones if row["seed"] in theirs]
    return interval(differences) if len(differences) > 1 else None
