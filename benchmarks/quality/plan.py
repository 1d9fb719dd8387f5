"""Which runs to make, in order: each stage looks at what the ones before it found."""

from collections.abc import Iterator, Sequence
from functools import partial

from .contenders import ABLATIONS, CONTENDERS
from .results import Key, Row, best_rate, missing_edge, select

RANK = 8


def sweep(
    rows: Sequence[Row], task: str, names: Sequence[str], rank: int, rates: Sequence[float] = ()
) -> Iterator[Key]:
    """Seed 0 at every rate of the contender's grid, and beyond it while the best is at an edge; or at `rates` alone."""
    for name in names:
        key = partial(Key, task, "main", name, rank, seed=0)
        if rates:
            yield from (key(rate) for rate in rates)
            continue
        yield from (key(rate) for rate in CONTENDERS[name].rates)
        while (rate := missing_edge(_of(rows, task, name, rank))) is not None:
            yield key(rate)


def repeat(rows: Sequence[Row], task: str, names: Sequence[str], rank: int, seeds: int) -> Iterator[Key]:
    """More seeds at each contender's best rate, where its sweep is done."""
    for seed in range(1, seeds):
        for name in names:
            mine = _of(rows, task, name, rank)
            if len(select(mine, seed=0)) >= len(CONTENDERS[name].rates) and missing_edge(mine) is None:
                yield Key(task, "main", name, rank, best_rate(mine), seed)


def ablate(rows: Sequence[Row], task: str, groups: Sequence[str], seeds: int) -> Iterator[Key]:
    """One factor at a time, at the best rate of LoRA-One (of the preconditioned one for its reg)."""
    for seed in range(seeds):
        for group in groups:
            model = "LoRA-One, preconditioned" if group == "reg" else "LoRA-One"
            rate = best_rate(_of(rows, task, model, RANK))
            yield from (Key(task, group, name, RANK, rate, seed) for name in ABLATIONS[group])


def _of(rows: Sequence[Row], task: str, name: str, rank: int) -> list[Row]:
    return select(rows, task=task, group="main", contender=name, rank=rank)
