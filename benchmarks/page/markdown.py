"""Tables and numbers in Markdown."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.results import Interval


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows]) + "\n"


def with_interval(found: Interval, scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
    """mean ± half width; the mean alone of a single run."""
    mean = f"{scale * found.mean:{sign}.{digits}f}"
    return mean if math.isnan(found.half) else f"{mean} ± {scale * found.half:.{digits}f}"


def renew_table(page: Path, module: str, text: str) -> None:
    """Write a table into a page, in the place of the one between its marks, which name the module that makes it."""
    begin, end = f"<!-- table: python -m {module} -->", "<!-- end of table -->"
    written = page.read_text(encoding="utf-8")
    block = f"{begin}\n{text}\n{end}"
    page.write_text(re.sub(f"{begin}.*{end}", lambda _: block, written, flags=re.DOTALL), encoding="utf-8")
