"""Tables and numbers in Markdown."""

import math
import textwrap
from collections.abc import Mapping, Sequence

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
    return f"**{text}**" if difference.verdict != "level" else text


def score_name(task: str) -> str:
    """What the score of a task is the share of."""
    return "accuracy" if task.startswith("minilm") else "exact match"


def sweeps(losses: Mapping[str, Mapping[float, float]], chosen: Mapping[str, float]) -> str:
    """A table of contenders by rate: the validation losses, that of the chosen rate in bold."""
    rates = sorted({rate for of_one in losses.values() for rate in of_one})
    lines = [
        [name, *(_loss(of_one.get(rate), rate == chosen[name]) for rate in rates)] for name, of_one in losses.items()
    ]
    return table(["", *(f"{rate:g}" for rate in rates)], lines)


def _loss(value: float | None, best: bool) -> str:
    if value is None:
        return ""
    text = "diverged" if math.isinf(value) else f"{value:.3f}"
    return f"**{text}**" if best else text
