"""One contender against others, by task and rank, with intervals for all comparisons of a table at once."""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.quality.results import Interval, Row
from benchmarks.quality.summary import by_protocol, paired

from .markdown import table, with_interval

RANKS = (4, 8, 16, 32, 64)
# In the order of the page.
TITLES = {
    "sort": "The embedded Llama: sort letters",
    "sort-long": "The same for longer: 200 steps of batch 32",
    "desc": "The embedded Llama, a harder shift: sort letters descending, in upper case",
    "t5": "A tiny T5, text to text: the largest letter, in upper case",
    "minilm": "A pretrained encoder (MiniLM): in which order are the words of a docstring",
}
ALONE = "a 95 % interval for this comparison alone"


class Comparison(NamedTuple):
    """The lead of one contender over another in a task at a rank, by seed."""

    task: str
    rank: int
    other: str
    alone: Interval  # 95 %
    corrected: Interval  # 95 % for all comparisons of the table at once

    @property
    def verdict(self) -> str:
        """By the corrected interval; "level" where it holds 0."""
        if abs(self.corrected.mean) <= self.corrected.half:
            return "level"
        return "ahead" if self.corrected.mean > 0 else "behind"

    @property
    def cell(self) -> str:
        """In points: **bold** by the corrected interval, *italic* by the other one alone."""
        text = with_interval(self.alone, 100.0, 1, "+")
        if self.verdict != "level":
            return f"**{text}**"
        return f"*{text}*" if abs(self.alone.mean) > self.alone.half else text


def compare(rows: Sequence[Row], name: str, others: Sequence[str], tasks: Iterable[str] = TITLES) -> list[Comparison]:
    """All comparisons whose runs are there."""
    pairs = []
    for task, rank in itertools.product(tasks, RANKS):
        found = by_protocol(rows, task, rank, (name, *others))
        if name in found:
            pairs += [(task, rank, other, found[name].rows, found[other].rows) for other in others if other in found]
    made = []
    for task, rank, other, ours, theirs in pairs:
        alone, corrected = (paired(ours, theirs, "score", count) for count in (1, len(pairs)))
        assert alone is not None and corrected is not None  # ten seeds each
        made.append(Comparison(task, rank, other, alone, corrected))
    return made


def lead_table(comparisons: Sequence[Comparison], others: Sequence[str]) -> str:
    """A line a task and rank, a column a contender that is compared with."""
    cells = {(c.task, c.rank, c.other): c.cell for c in comparisons}
    present = [other for other in others if any(c.other == other for c in comparisons)]
    lines = [
        [f"{task}, r = {rank}", *(cells.get((task, rank, other), "") for other in present)]
        for task, rank in dict.fromkeys((c.task, c.rank) for c in comparisons)
    ]
    return table(["", *(f"over {other}" for other in present)], lines)


def counted(comparisons: Sequence[Comparison]) -> str:
    """In how many of them it is ahead, level and behind."""
    verdicts = {verdict: [c for c in comparisons if c.verdict == verdict] for verdict in ("ahead", "level", "behind")}
    parts = [f"{verdict} in {len(found)}" for verdict, found in verdicts.items()]
    return f"{', '.join(parts)} of {len(comparisons)}"


def named(comparisons: Sequence[Comparison], verdict: str) -> str:
    """Where it has a verdict."""
    return ", ".join(f"{c.task} at rank {c.rank}" for c in comparisons if c.verdict == verdict) or "nowhere"


def correction(comparisons: Sequence[Comparison]) -> str:
    """What the marks of a table mean, and how many comparisons it makes."""
    return (
        f"{len(comparisons)} comparisons, paired by seed; ± is {ALONE}. **Bold**: 0 is outside of the interval that "
        "is wide enough for all of them at once (Bonferroni), so that a winner may be named. *Italic*: only outside of "
        "the one shown, as one in twenty would be by chance."
    )
