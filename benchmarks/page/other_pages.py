"""Links to what else was measured: each topic has a page of its own."""

from pathlib import Path

_PAGES = {
    "preconditioner.md": "does the r x r preconditioner pay",
    "theory.md": "the figures of the paper's theory",
    "conformance.md": "the same numbers in every framework",
    "interchange.md": "adapters that travel between frameworks",
    "speed.md": "time and memory of the start and of a step",
    "estimate.md": "what a run will cost, before it is started",
    "recipes.md": "the paper's benchmarks as recipes",
}


def section(docs: Path) -> str:
    """The pages that are there."""
    lines = [f"- [{topic}]({name})" for name, topic in _PAGES.items() if (docs / name).is_file()]
    return "\n".join(["## Measured elsewhere", "", *lines, ""]) if lines else ""
