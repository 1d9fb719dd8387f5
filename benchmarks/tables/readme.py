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
ROWS = (
    "Start without data",
    "Quantised base",
    "Experts as one parameter",
    "Embeddings",
    "DoRA",
    "Adaptive rank",
    "New heads (modules_to_save)",
    "Several processes, whole model in each",
    "Sharded weights",
    "Tensor parallel",
    "PEFT opens the folder",
    "mlx-lm opens the folder",
    "Merge",
)


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
    return table(["% right, rank 8", "LoRA", "LoRA-One", "difference by seed"], lines).strip()


def features() -> str:
    """The rows of docs/features.md that people ask for first."""
    page = FEATURES.read_text(encoding="utf-8").partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    cells = {name: answers for name, *answers, _ in rows}
    chosen = [[name, *cells[name]] for name in ROWS]
    return "\n".join(
        f"| {' | '.join(line)} |" for line in [["", *cells[""]], ["---", *[":-:"] * len(cells[""])], *chosen]
    )
