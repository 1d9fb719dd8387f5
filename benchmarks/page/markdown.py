"""Tables and numbers in Markdown."""

import math
import textwrap
from collections.abc import Sequence

from benchmarks.quality.results import Interval


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows]) + "\n"


def paragraph(text: str) -> str:
    """A text in lines of the pages' width."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def with_interval(found: Interval, scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
    """mean ± half width; the mean alone of a single run."""
    mean = f"{scale * found.mean:{sign}.{digits}f}"
    return mean if math.isnan(found.half) else f"{mean} ± {scale * found.half:.{digits}f}"


def signed(difference: Interval, scale: float = 100.0, digits: int = 1) -> str:
    """A difference, in points unless another scale is given; bold where its interval leaves out 0."""
    text = with_interval(difference, scale, digits, "+")
    return f"**{text}**" if abs(difference.mean) > difference.half else text


def score_name(task: str) -> str:
    """What the score of a task is the share of."""
    return "accuracy" if task.startswith("minilm") else "exact match"
