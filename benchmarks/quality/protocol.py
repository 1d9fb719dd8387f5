"""The protocol, fixed before any run of it: how a rate is chosen, and on what contenders are compared. No framework.

1. A rate is 1, 1.5, 2, 3, 5 or 7 times a power of ten, for every contender.
2. A contender's rate, by task and rank, is the one of least mean loss on the validation items, over the choice seeds.
   The search goes on until the two rates below it and the two above it have been run with all of these seeds.
3. Then it is trained at this rate with the test seeds, and only then looks at the test items.

No seed chooses and tests, and the test items are new: nobody had looked at them when this was written.
"""

import math
from collections.abc import Iterator, Sequence

from .results import Key, Row, select

LADDER = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 1.5, 2, 3, 5, 7))
CHOICE_SEEDS = (0, 1, 2)
TEST_SEEDS = tuple(range(10, 20))
REACH = 2  # rates on each side of the best


def validation(rows: Sequence[Row], seeds: Sequence[int] = CHOICE_SEEDS) -> dict[float, float]:
    """Rate -> mean validation loss of a contender, of the rates that all these seeds have run; inf if one diverged."""
    found = {}
    for rate in sorted({row["rate"] for row in rows if row["rate"] in LADDER}):
        losses = {row["seed"]: row["valid_loss"] for row in select(rows, rate=rate) if row["seed"] in seeds}
        if len(losses) == len(seeds):
            mean = sum(losses.values()) / len(losses)
            found[rate] = mean if math.isfinite(mean) else math.inf
    return found


def chosen_rate(rows: Sequence[Row]) -> float | None:
    """The rate that a contender is compared at; None while its search goes on."""
    found = validation(rows)
    if not found:
        return None
    best = min(found, key=lambda rate: found[rate])
    return best if all(rate in found for rate in _around(best)) else None


def choice(rows: Sequence[Row], task: str, name: str, rank: int, first: float) -> Iterator[Key]:
    """The next runs of the search for a rate, to be asked for when those before are among `rows`.

    Args:
        first: the rate to begin with, where nothing has been run.
    """
    while True:
        mine = select(rows, task=task, group="main", contender=name, rank=rank)
        if chosen_rate(mine) is not None:
            return
        found = validation(mine)
        best = min(found, key=lambda rate: found[rate]) if found else _begin(mine, first)
        rate = next(rate for rate in _around(best) if rate not in found)
        done = {row["seed"] for row in select(mine, rate=rate)}
        yield from (Key(task, "main", name, rank, rate, seed) for seed in CHOICE_SEEDS if seed not in done)


def test(rows: Sequence[Row], task: str, name: str, rank: int) -> Iterator[Key]:
    """The runs of the comparison, once the rate is chosen."""
    rate = chosen_rate(select(rows, task=task, group="main", contender=name, rank=rank))
    if rate is not None:
        yield from (Key(task, "main", name, rank, rate, seed) for seed in TEST_SEEDS)


def tested(rows: Sequence[Row], task: str, name: str, rank: int) -> list[Row]:
    """The runs that a contender is compared by, in the order of the test seeds; none unless all are there."""
    mine = select(rows, task=task, group="main", contender=name, rank=rank)
    rate = chosen_rate(mine)
    found = {row["seed"]: row for row in mine if row["rate"] == rate}
    return [found[seed] for seed in TEST_SEEDS] if all(seed in found for seed in TEST_SEEDS) else []


def _around(rate: float) -> list[float]:
    """A rate, its neighbours, and theirs."""
    index = LADDER.index(rate)
    offsets = [0, *(sign * step for step in range(1, REACH + 1) for sign in (-1, 1))]
    return [LADDER[index + offset] for offset in offsets]


def _begin(rows: Sequence[Row], first: float) -> float:
    """The best of what one seed has been run at, or `first`."""
    tried = [row for row in rows if row["seed"] in CHOICE_SEEDS and row["rate"] in LADDER]
    tried = [row for row in tried if math.isfinite(row["valid_loss"])]
    return min(tried, key=lambda row: row["valid_loss"])["rate"] if tried else first
