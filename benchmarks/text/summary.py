"""What the runs of a task come to. Needs no framework."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.quality.protocol import LADDER, validation
from benchmarks.quality.results import Row, select


class Summary(NamedTuple):
    """A contender at the rate that was chosen for it.

    Attributes:
        settled: the rates on both sides were worse; else the search was out of time.
        rates: how many were tried.
        rows: the runs that are compared, of the seeds that every contender has, in their order.
        seconds: of the start and of the training, the mean of the runs that had the machine for themselves.
    """

    name: str
    rate: float
    settled: bool
    rates: int
    rows: list[Row]
    seconds: tuple[float, float]


def chosen_rate(rows: Sequence[Row], choice_seeds: Sequence[int]) -> float | None:
    """The rate of a contender's least mean validation loss; None if no rate has one that is finite."""
    losses = validation(rows, choice_seeds)
    best = min(losses, key=lambda rate: losses[rate], default=None)
    return best if best is not None and math.isfinite(losses[best]) else None


def summarize(rows: Sequence[Row], task: str, choice_seeds: Sequence[int], stride: int) -> list[Summary]:
    """The contenders of a task that have runs to compare.

    Args:
        stride: of the search at its end, on the ladder.
    """
    found: dict[str, Summary] = {}
    for name in dict.fromkeys(row["contender"] for row in select(rows, task=task)):
        mine = select(rows, task=task, contender=name)
        rate = chosen_rate(mine, choice_seeds)
        compared = [row for row in mine if row["rate"] == rate and row["seed"] not in choice_seeds]
        if rate is None or not compared:
            continue
        tried, index = validation(mine, choice_seeds), LADDER.index(rate)
        settled = all(LADDER[k] in tried for k in (index - stride, index + stride))
        timed = [row for row in compared if "seconds_train" in row]
        seconds = [sum(row[f"seconds_{part}"] for row in timed) / max(len(timed), 1) for part in ("init", "train")]
        found[name] = Summary(name, rate, settled, len(tried), compared, (seconds[0], seconds[1]))
    seeds = set.intersection(*({row["seed"] for row in s.rows} for s in found.values())) if found else set()
    by_seed = {n: sorted((r for r in s.rows if r["seed"] in seeds), key=lambda r: r["seed"]) for n, s in found.items()}
    return [s._replace(rows=by_seed[name]) for name, s in found.items() if by_seed[name]]
