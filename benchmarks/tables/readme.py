"""The two tables of the README."""

from pathlib import Path

from benchmarks.page.comparisons import compare
from benchmarks.page.markdown import table
from benchmarks.quality.plan import PEERS, TODAY
from benchmarks.quality.results import read_rows
from benchmarks.quality.summary import by_protocol

FEATURES = Path(__file__).parents[2] / "docs" / "features.md"
TASKS = {
    "sort": "A tiny Llama: sort letters",
    "desc": "A tiny Llama: sort descending, in upper case",
    "t5": "A tiny T5: the largest letter",
    "minilm": "MiniLM: the order of a text's words",
}
COLUMNS = {  # a feature of that page -> how the README calls it
    "Start without data": "without data",
    "Quantised base": "4-bit base",
    "Experts as one parameter": "experts",
    "New heads (modules_to_save)": "new heads",
    "DoRA": "DoRA",
    "Several processes, whole model in each": "data parallel",
    "Sharded weights": "sharded",
    "PEFT opens the folder": "opens in PEFT",
    "mlx-lm opens the folder": "in mlx-lm",
}


COMPARED = ("LoRA", "LoRA-One", "by seed")


def results() -> str:
    """LoRA and LoRA-One at ranks 8 and 32, each at its own rate, and their difference by seed."""
    rows = read_rows()
    comparisons = {(c.task, c.rank): c for c in compare(rows, (TODAY,), PEERS) if c.other == "LoRA"}
    lines = []
    for task, title in TASKS.items():
        cells = []
        for rank in (8, 32):
            found = by_protocol(rows, task, rank, ("LoRA", TODAY))
            scores = [f"{100 * found[name].score.mean:.1f}" if name in found else "" for name in ("LoRA", TODAY)]
            cells += [*scores, comparisons[task, rank].cell if (task, rank) in comparisons else ""]
        if any((task, rank) in comparisons for rank in (8, 32)):
            lines.append([title, *cells])
    return _compact(table(["% right", *(f"{name}, rank {rank}" for rank in (8, 32) for name in COMPARED)], lines))


def features() -> str:
    """What people ask for first, of docs/features.md: a row for each framework."""
    page = FEATURES.read_text(encoding="utf-8").partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    cells = {name: answers for name, *answers, _ in rows}
    answers = zip(cells[""], *(cells[name] for name in COLUMNS), strict=True)
    lines = [["", *COLUMNS.values()], ["---", *[":-:"] * len(COLUMNS)], *answers]
    return _compact("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _compact(text: str) -> str:
    """Without the spaces beside the bars, so that the README's words are words."""
    return text.strip().replace(" | ", "|").replace("| ", "|").replace(" |", "|")
