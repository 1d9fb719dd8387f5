"""The rows on disk, and the questions that are asked of them. Needs no framework."""

import fcntl
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scipy.stats

RESULT = Path(__file__).parents[1] / "results" / "quality.json"
ABLATIONS = RESULT.with_name("ablations.json")
Row = dict[str, Any]


class Key(NamedTuple):
    """What makes a run: the same key is the same run. `group` is "main", or the factor that an ablation varies."""

    task: str
    group: str
    contender: str
    rank: int
    rate: float
    seed: int


class Interval(NamedTuple):
    """A mean and the half width of its interval by Student's t; nan for a single value."""

    mean: float
    half: float
    count: int

    @property
    def verdict(self) -> str:
        """Of a lead: "ahead", "behind", or "level" where the interval holds 0 or there is none."""
        if not abs(self.mean) > self.half:
            return "level"
        return "ahead" if self.mean > 0 else "behind"


def key_of(row: Row) -> Key:
    """The key of a row."""
    return Key(*(row[name] for name in Key._fields))


def read_rows(path: Path = RESULT) -> list[Row]:
    """All rows there are."""
    return json.loads(path.read_text()) if path.exists() else []


def add_row(row: Row, path: Path = RESULT) -> list[Row]:
    """Add a row to a file that other processes may add to as well. Returns all that it has then."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = merge(read_rows(path), [row])
        write_rows(rows, path)
    return rows


def write_rows(rows: Iterable[Row], path: Path = RESULT) -> None:
    """Write rows, one a line, in place of what was there: a kill in between leaves the old file."""
    part = path.with_suffix(".part")
    part.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    part.replace(path)


def merge(rows: Sequence[Row], others: Iterable[Row]) -> list[Row]:
    """`rows`, then those of `others` whose keys are new.

    Raises:
        ValueError: runs that both have, with different numbers; it names them all.
    """
    found = {key_of(row): row for row in rows}
    conflicts = []
    for row in others:
        if repr(found.setdefault(key_of(row), row)) != repr(row):  # repr: nan is not equal to itself
            conflicts.append(key_of(row))
    if conflicts:
        named = "\n".join(" ".join(map(str, key)) for key in conflicts)
        raise ValueError(f"{len(conflicts)} runs are in both with different numbers; remove one of each:\n{named}")
    return list(found.values())


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def best_rate(rows: Sequence[Row]) -> float:
    """The rate of the least validation loss among the runs of one contender with seed 0: of the smaller comparisons."""
    first = select(rows, seed=0)
    return min(first, key=lambda row: _worst_if_nan(row["valid_loss"]))["rate"]


def interval(values: Sequence[float], comparisons: int = 1) -> Interval:
    """Mean and 95 % interval of some runs.

    Args:
        comparisons: that are made; the interval is wide enough for all of them to hold at once (Bonferroni).
    """
    count = len(values)
    if count < 2:
        return Interval(values[0], math.nan, count)
    quantile = float(scipy.stats.t.ppf(1.0 - 0.025 / comparisons, count - 1))
    return Interval(statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(count), count)


def trailing_mean(losses: Sequence[float], width: int = 10) -> list[float]:
    """At each step, the mean of the last `width` losses; nan for the first width - 1."""
    return [math.nan] * (width - 1) + [
        sum(losses[i - width + 1 : i + 1]) / width for i in range(width - 1, len(losses))
    ]


def steps_to_reach(losses: Sequence[float], goal: float) -> int | None:
    """The first step after which the trailing mean is not above `goal`; None if there is none."""
    return next((step for step, mean in enumerate(trailing_mean(losses), start=1) if mean <= goal), None)


def _worst_if_nan(x: float) -> float:
    return math.inf if math.isnan(x) else x
