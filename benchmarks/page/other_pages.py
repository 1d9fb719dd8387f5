"""Links to what else was measured: each topic has a page, pictures and raw numbers of its own."""

from pathlib import Path

# Topic -> the stem of its page, of its pictures and of its results.
_TOPICS = {
    "The figures of the paper's theory": ("theory",),
    "Does the r x r preconditioner pay?": ("preconditioner",),
    "Time and memory of the start and of a step": ("speed", "init", "step"),
    "What a run will cost, before it is started": ("estimate", "cost"),
    "The same numbers in every framework": ("conformance", "agreement"),
    "Adapters that travel between frameworks": ("interchange",),
    "The paper's benchmarks as recipes": ("recipes",),
}


def section(docs: Path, results: Path) -> str:
    """A part a topic of which there is anything."""
    parts = [part for topic, stems in _TOPICS.items() if (part := _topic(topic, stems, docs, results))]
    return "\n".join(["## Measured elsewhere\n", *parts]) if parts else ""


def _topic(topic: str, stems: tuple[str, ...], docs: Path, results: Path) -> str:
    pages = [f"[{stem}.md]({stem}.md)" for stem in stems if (docs / f"{stem}.md").is_file()]
    numbers = [
        f"[{stem}.json](../benchmarks/results/{stem}.json)" for stem in stems if (results / f"{stem}.json").is_file()
    ]
    pictures = [path.name for stem in stems for path in sorted(docs.glob(f"{stem}*.png"))]
    if not pages and not numbers:
        return ""
    drawn = [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    return "\n".join([f"### {topic}\n", ", ".join([*pages, *numbers]) + "\n", *drawn])
