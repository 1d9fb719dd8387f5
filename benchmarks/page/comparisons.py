"""One contender against others, by task and rank, with intervals for all comparisons of a table at once."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.quality.results import Interval, Row
from benchmarks.quality.summary import by_protocol, paired

from .markdown import paragraph, table, with_interval

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
    name: str
    other: str
    alone: Interval  # 95 %
    corrected: Interval  # 95 % for all comparisons of the table at once

    @property
    def verdict(self) -> str:
        """By the corrected interval."""
        return self.corrected.verdict

    @property
    def place(self) -> str:
        """Where it was made, in words."""
        return f"{self.task} at rank {self.rank}"

    @property
    def cell(self) -> str:
        """In points: **bold** by the corrected interval, *italic* by the other one alone."""
        text = with_interval(self.alone, 100.0, 1, "+")
        if self.verdict != "level":
            return f"**{text}**"
        return f"*{text}*" if self.alone.verdict != "level" else text


def compare(rows: Sequence[Row], names: Sequence[str], others: Sequence[str]) -> list[Comparison]:
    """All comparisons of `names` with `others` whose runs are there."""
    pairs = []
    for task, rank in itertools.product(TITLES, RANKS):
        found = by_protocol(rows, task, rank, (*names, *others))
        for name, other in itertools.product(names, others):
            if name in found and other in found:
                pairs.append((task, rank, name, other, found[name].rows, found[other].rows))
    made = []
    for task, rank, name, other, ours, theirs in pairs:
        alone, corrected = (paired(ours, theirs, "score", count) for count in (1, len(pairs)))
        assert alone is not None and corrected is not None  # ten seeds each
        made.append(Comparison(task, rank, name, other, alone, corrected))
    return made


def lead_table(comparisons: Sequence[Comparison], columns: Mapping[str, str], by: str = "other") -> str:
    """A line a task and rank.

    Args:
        columns: contender -> the heading of its column.
        by: "name" or "other": which of the two contenders has a column.
    """
    cells = {(c.task, c.rank, getattr(c, by)): c.cell for c in comparisons}
    present = [name for name in columns if any(name == key[2] for key in cells)]
    lines = [
        [f"{task}, r = {rank}", *(cells.get((task, rank, name), "") for name in present)]
        for task, rank in dict.fromkeys((c.task, c.rank) for c in comparisons)
    ]
    return table(["", *(columns[name] for name in present)], lines)


def variants_table(comparisons: Sequence[Comparison], names: Sequence[str]) -> str:
    """The same for variants of LoRA-One, a column each, under what its marks mean."""
    columns = {name: name.removeprefix("LoRA-One, ") for name in names}
    return f"{correction(comparisons)}\n\n{lead_table(comparisons, columns, 'name')}"


def counted(comparisons: Sequence[Comparison]) -> str:
    """In how many of them it is ahead, level and behind."""
    verdicts = {verdict: [c for c in comparisons if c.verdict == verdict] for verdict in ("ahead", "level", "behind")}
    parts = [f"{verdict} in {len(found)}" for verdict, found in verdicts.items()]
    return f"{', '.join(parts)} of {len(comparisons)}"


def named(comparisons: Sequence[Comparison], verdict: str) -> str:
    """Where it has a verdict."""
    return ", ".join(c.place for c in comparisons if c.verdict == verdict) or "nowhere"


def correction(comparisons: Sequence[Comparison]) -> str:
    """What the marks of a table mean, and how many comparisons it makes."""
    return paragraph(
        f"{len(comparisons)} comparisons, paired by seed; ± is {ALONE}. **Bold**: 0 is outside of the interval that "
        "is wide enough for all of them at once (Bonferroni), so that a winner may be named. *Italic*: only outside of "
        "the one shown, as one in twenty would be by chance."
    )
