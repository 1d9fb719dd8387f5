"""The two tables of the README."""

from pathlib import Path

from benchmarks.page.markdown import table, with_interval
from benchmarks.page.quality import signed, summaries
from benchmarks.quality.results import read_rows
from benchmarks.quality.summary import paired

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


def results() -> str:
    """LoRA and LoRA-One at rank 8, each at its best rate, and their difference by seed."""
    rows = read_rows()
    lines = []
    for task, title in TASKS.items():
        found = {summary.name: summary for summary in summaries(rows, task, 8)}
        lora, ours = found["LoRA"], found["LoRA-One"]
        lead = paired(ours.rows, lora.rows, "score")
        scores = [with_interval(summary.score, 100) for summary in (lora, ours)]
        lines.append([title, *scores, "" if lead is None else signed(lead)])
    return _compact(table(["% right, rank 8", "LoRA", "LoRA-One", "difference by seed"], lines))


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
