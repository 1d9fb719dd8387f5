"""Tables and sentences of the pages that are made of data, not typed: `python -m benchmarks.tables` renews all.

A page has `<!-- table: NAME, python -m benchmarks.tables -->`, then what the function of that name in `TABLES` returns,
then `<!-- end of table -->`. A test compares all pages with these functions.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from . import code, readme

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "adapters", "benchmarks")
MARKED = re.compile(
    r"(?<=<!-- table: )([\w-]+)(, python -m benchmarks\.tables -->\n)(.*?)(?=\n<!-- end of table -->)", flags=re.DOTALL
)
TABLES: dict[str, Callable[[], str]] = {
    "options": code.options,
    "recipes": code.recipes,
    "readme-results": readme.results,
    "readme-features": readme.features,
}


def pages() -> Iterator[Path]:
    """Yield every page that may have marks."""
    yield from sorted(ROOT.glob("*.md"))
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.md"))


def names(text: str) -> list[str]:
    """Return the names of the tables of a page."""
    return [name for name, *_ in MARKED.findall(text)]


def renewed(text: str) -> str:
    """Return a page with what its marks name made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{found[2]}{TABLES[found[1]]()}", text)
