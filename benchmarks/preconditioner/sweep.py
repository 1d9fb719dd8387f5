"""The results file, and the climb over the learning rate that every rule gets for itself."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .rules import Rule
from .training import run

RESULT = Path(__file__).parents[1] / "results" / "preconditioner.json"


class Cell(NamedTuple):
    """What has a best learning rate of its own."""

    job: str
    task: str
    rank: int
    rule: Rule
    seed: int = 0


class OutOfTime(Exception):
    """The deadline has passed, and a run is missing."""


class Results:
    """The rows on disk. Asking for a run makes it, unless it is there, and saves it.

    Args:
        deadline: of `time.monotonic`; after it no run is begun.
    """

    def __init__(self, path: Path = RESULT, deadline: float = math.inf):
        self._deadline = deadline
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        self._by_key = {_key(row): row for row in self.rows}

    def get(self, cell: Cell, rate: float) -> dict[str, Any]:
        """The row of one run.

        Raises:
            OutOfTime: it is not there, and the deadline has passed.
        """
        key = (cell.job, cell.task, cell.rank, cell.rule, rate, cell.seed)
        if key not in self._by_key:
            if time.monotonic() > self._deadline:
                raise OutOfTime
            row = run(cell.job, cell.task, cell.rank, cell.rule, rate, cell.seed)
            self._by_key[key] = row
            self.rows.append(row)
            self.path.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
            print(json.dumps(row), flush=True)
        return self._by_key[key]

    def best(self, cell: Cell) -> dict[str, Any] | None:
        """The row of the rate with the least held-out loss among the runs that are there."""
        rows = [row for row in self.rows if _key(row)[:4] == cell[:4] and row["seed"] == cell.seed]
        return min(rows, key=loss_of, default=None)


def climb(loss_at: Callable[[int], float], first: int, span: int = 12) -> int:
    """The integer k whose loss is below both neighbours', by steps downhill from `first`; at most `span` away."""
    best = first
    while True:
        around = min((best - 1, best, best + 1), key=loss_at)
        if around == best or abs(around - first) > span:
            return best
        best = around


def tune(results: Results, cell: Cell, first: float, per_decade: int) -> dict[str, Any]:
    """The row of the best rate on the grid 10^(k / per_decade), found by climbing from near `first`."""

    def rate(k: int) -> float:
        return float(f"{10 ** (k / per_decade):.3g}")

    k = climb(lambda k: loss_of(results.get(cell, rate(k))), round(per_decade * math.log10(first)))
    return results.get(cell, rate(k))


def loss_of(row: dict[str, Any]) -> float:
    """Held-out loss; infinite where the run diverged."""
    return math.inf if row["loss"] is None else row["loss"]


def rule_of(row: dict[str, Any]) -> Rule:
    """The rule that a row was made by."""
    return Rule(row["optimizer"], row["place"], row["damping"], row["reg"])


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["job"], row["task"], row["rank"], rule_of(row), row["rate"], row["seed"]
