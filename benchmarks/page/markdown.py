"""Tables and numbers in Markdown."""

import math
from collections.abc import Sequence

from benchmarks.quality.results import Interval


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows]) + "\n"


def with_interval(found: Interval, scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
    """mean ± half width; the mean alone of a single run."""
    mean = f"{scale * found.mean:{sign}.{digits}f}"
    return mean if math.isnan(found.half) else f"{mean} ± {scale * found.half:.{digits}f}"
