"""Tables and sentences of the pages that are made of data, not typed: `python -m benchmarks.tables` renews all.

A page has `<!-- table: NAME, python -m benchmarks.tables -->`, then what the function of that name in `TABLES` returns,
then `<!-- end of table -->`. A test compares all pages with these functions.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import deferred, devices

from . import agreement, code, estimates, readme, speed, theory
from .results import read

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "adapters", "benchmarks")
BEGIN, END = "<!-- table: {}, python -m benchmarks.tables -->\n", "<!-- end of table -->"
MARKED = re.compile(f"{BEGIN.format('([a-z0-9-]+)')}(.*?){END}", flags=re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {
    "readme-results": readme.results,
    "readme-features": readme.features,
    "options": code.options,
    "recipes": code.recipes,
    "speed": speed.summary,
    "start-cpu": speed.starts_on_cpu,
    "start-cpu-by-batches": speed.starts_by_batches,
    "start-h100": speed.starts_on_gpu,
    "start-h100-all": speed.all_starts_on_gpu,
    "step-cpu": speed.step_on_cpu,
    "step-other-cpu": speed.step_on_another_cpu,
    "step-h100": speed.step_on_gpu,
    "step-h100-summary": speed.step_summary,
    "mlx-memory": speed.mlx_memory,
    "estimate-example": estimates.example,
    "estimate-rates": estimates.rates,
    "estimate-cpu": estimates.on_cpu,
    "estimate-h100": estimates.on_gpu,
    "estimate-h100-spread": estimates.spread_on_gpu,
    "devices-sent": lambda: devices.sent(read("devices")),
    "devices-by-cards": devices.sent_by_cards,
    "without-data-score": lambda: deferred.compared(read("deferred"), "score"),
    "without-data-loss": lambda: deferred.compared(read("deferred"), "test_loss"),
    "without-data-held": lambda: deferred.held_by_step(read("deferred")),
    "agreement": agreement.errors,
    "agreement-rounding": agreement.rounding,
    "theory-alignment": theory.alignment,
    "theory-preconditioning": theory.preconditioning,
    "theory-conditioning": theory.conditioning,
    "theory-portrait": theory.portrait,
    "theory-relu": theory.relu,
}


def pages() -> Iterator[Path]:
    """Yield every page that may have marks."""
    yield from sorted(ROOT.glob("*.md"))
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.md"))


def names(text: str) -> list[str]:
    """Return the names of the tables of a page."""
    return [found[1] for found in MARKED.finditer(text)]


def renewed(text: str) -> str:
    """Return a page with what its marks name made anew."""
    return MARKED.sub(lambda found: f"{BEGIN.format(found[1])}{TABLES[found[1]]()}\n{END}", text)
