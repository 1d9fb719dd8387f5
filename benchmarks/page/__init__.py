"""docs/evidence/quality.md, made of the JSON in benchmarks/results: `make_page` is a function of those files alone."""

from pathlib import Path

from . import ablations, adaptive_rank, balance, conclusions, dora, earlier, heads, quality

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "evidence" / "quality.md"

INTRODUCTION = """# Results

This page is made by `python -m benchmarks.page` from the JSON files in `benchmarks/results/`; nothing in it is typed by
hand but the sentences around the numbers. Each part names the command that made its numbers: all run offline. LoRA-One
does not win everywhere, and the tables say where.
"""


def make_page(results: Path = RESULTS) -> str:
    """The page's text.

    Args:
        results: the JSON files; a part whose file is not there is left out.
    """
    parts = [
        INTRODUCTION,
        conclusions.section(results / "quality.json"),
        quality.section(results / "quality.json"),
        balance.section(results / "quality.json"),
        quality.details(results / "quality.json", results / "heads.json"),
        ablations.section(results / "ablations.json", results / "quality.json"),
        adaptive_rank.section(results / "adaptive_rank.json"),
        dora.section(results / "dora.json"),
        heads.section(results / "heads.json", results / "quality.json"),
        earlier.energy(results / "energy.json"),
        earlier.gamma(results / "gamma.json"),
    ]
    return "\n".join(part for part in parts if part)
