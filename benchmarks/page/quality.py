"""Fine-tuning quality: who leads by how much, then a table and a picture a task."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import protocol
from benchmarks.quality.plan import CELLS, OURS, PEERS, TODAY
from benchmarks.quality.results import Row, read_rows, select
from benchmarks.quality.summary import Summary, by_protocol

from .comparisons import RANKS, TITLES, compare, correction, lead_table
from .markdown import score_name, sweeps, table, with_interval

CONTENDERS = (*PEERS, *OURS)
SHOWN = (8, 32)  # ranks whose tables are on the page whole

HOW = f"""## How it was measured

The protocol was fixed, and committed, before any of its runs (`benchmarks/quality/protocol.py`):

1. A rate is 1, 1.5, 2, 3, 5 or 7 times a power of ten, for every contender.
2. A contender's rate, by task and rank, is the one of least mean validation loss over seeds 0, 1 and 2. The search goes
   on until the two rates below it and the two above it have been run with all three seeds, so the best is never at an
   edge.
3. Then it is trained with seeds 10 to 19, none of which has chosen anything, and tested on 512 new items that nobody
   had looked at: of the same kind for the Llama and the T5; for MiniLM of NumPy's docstrings, where training has
   those of Python's standard library.
4. A table of leads says how many comparisons it makes, and its bold marks hold for all of them at once.

A run is short (100 steps of batch 16), on one thread, in float32, by AdamW without weight decay on a linear schedule
after 10 steps of warm-up. Within a seed all contenders see the same batches. LoRA, rsLoRA, PiSSA, LoRA-GA and LoRA+ are
PEFT's own, alpha 16 (PiSSA: r), each with its paper's settings; LoRA-One is `lora_one.init` in one pass over 8 batches,
with rsLoRA's scale and plain AdamW. Its name says the balance: 0.5 is the paper's, {TODAY.split()[-1]} the default.

`python -m benchmarks.quality` makes what is missing; one cell is made again by
`python -m benchmarks.quality --tasks sort --ranks 32 --only "LoRA-One, balance 0" --again`.
`--stale` begins a run of each cell anew and compares its first losses, its data and its passes with what is written
down: what today's code no longer makes is computed, not remembered. Of older runs those that only chose a rate were
kept, where they fit.
"""


def section(file: Path) -> str:
    """Protocol, leads, tasks."""
    rows = read_rows(file)
    if not any(found(rows, task, rank) for task in TITLES for rank in RANKS):
        return ""
    parts = [_leads(rows), HOW, _machine(rows)]
    return "\n".join(part for part in parts if part)


def details(file: Path, heads: Path) -> str:
    """The tables of every task; of the one with a new head (heads.json), what the head alone can do."""
    rows = read_rows(file)
    notes = {"minilm": _head_alone(heads)}
    parts = [
        _task(rows, task, [rank for rank in SHOWN if found(rows, task, rank)], notes.get(task, "")) for task in TITLES
    ]
    parts = [part for part in parts if part]
    if not parts:
        return ""
    return "\n".join(["## Every task\n", KEY, *parts, _ranks(rows), _coverage(rows), LIMITS])


def found(rows: Sequence[Row], task: str, rank: int) -> dict[str, Summary]:
    """The summaries of the contenders that are compared, in the page's order."""
    return by_protocol(rows, task, rank, CONTENDERS)


def label(name: str) -> str:
    """A contender's name; the default's says so."""
    return f"{name} (default)" if name == TODAY else name


def _leads(rows: Sequence[Row]) -> str:
    comparisons = compare(rows, (TODAY,), PEERS)
    if not comparisons:
        return ""
    return (
        "## LoRA-One's lead, in points of the test score\n\n"
        f"Of {label(TODAY)}, each contender at its own rate.\n{correction(comparisons)}\n\n"
        + lead_table(comparisons, {peer: f"over {peer}" for peer in PEERS})
    )


def _machine(rows: Sequence[Row]) -> str:
    versions = sorted({(row["python"], row["torch"]) for row in rows})
    return "Made with " + "; ".join(f"Python {python}, torch {torch}" for python, torch in versions) + ".\n"


def _head_alone(file: Path) -> str:
    """What the fitted head is right in, from which every contender goes on."""
    if not file.exists():
        return ""
    share = json.loads(file.read_text())["fitted_head_alone"]
    return f"The fitted head alone, from which all go on, is right in {100 * share:.1f} % of the older test items.\n\n"


KEY = """*Steps to LoRA's loss*: the first step at which the mean of the last ten training losses is at or below what
LoRA, with the same seed, ends with; in brackets how many times fewer that is than LoRA took. *Seconds* are processor
seconds: of the start (one pass), and of the training; *seconds to it* include the start.
"""


def _task(rows: Sequence[Row], task: str, ranks: Sequence[int], note: str) -> str:
    if not ranks:
        return ""
    parts = [f"### {TITLES[task]}\n\n{note}"]
    for rank in ranks:
        summaries = list(found(rows, task, rank).values())
        header = [f"rank {rank}", "rate", f"{score_name(task)}, %", "test loss", "loss of steps 1-20"]
        header += ["steps to LoRA's loss", "seconds to it", "seconds"]
        parts.append(table(header, [_line(s) for s in summaries]))
        parts.append(f"![Loss against steps and time](../images/quality-{task}-{rank}.png)\n")
        parts.append(_sweeps(rows, task, rank, summaries))
    return "\n".join(parts)


def _line(s: Summary) -> list[str]:
    steps = len(s.rows[0]["losses"])
    return [
        label(s.name),
        f"{s.rate:g}",
        with_interval(s.score, 100),
        with_interval(s.test_loss, 1, 3),
        with_interval(s.first, 1, 2),
        _steps(s, steps),
        _seconds(s, steps),
        f"{s.seconds_init:.1f} + {s.seconds_train:.1f}",
    ]


def _steps(summary: Summary, total: int) -> str:
    reached = [step for step in summary.steps if step is not None]
    if not reached or summary.name == "LoRA":
        return str(total) if summary.name == "LoRA" else "not reached"
    mean = sum(reached) / len(reached)
    text = f"{mean:.0f} ({total / mean:.1f}x)"
    missing = len(summary.steps) - len(reached)
    return text + (f"; not reached by {missing} of {len(summary.steps)}" if missing else "")


def _seconds(summary: Summary, total: int) -> str:
    """Processor seconds to LoRA's loss, the start included; of the seeds that reach it."""
    reached = [total] if summary.name == "LoRA" else [step for step in summary.steps if step is not None]
    if not reached:
        return ""
    return f"{summary.seconds_init + summary.seconds_train * sum(reached) / len(reached) / total:.1f}"


def _sweeps(rows: Sequence[Row], task: str, rank: int, summaries: Sequence[Summary]) -> str:
    """Mean validation loss over the choice seeds by rate: what chose each rate."""
    mine = select(rows, task=task, group="main", rank=rank)
    of_each = {s.name: protocol.validation(select(mine, contender=s.name)) for s in summaries}
    return (
        f"<details><summary>The sweeps at rank {rank}: validation loss by learning rate, mean of three seeds</summary>"
        "\n\n" + sweeps(of_each, {s.name: s.rate for s in summaries}) + "\n</details>\n"
    )


def _ranks(rows: Sequence[Row]) -> str:
    parts = ["### By rank\n\nTest score in %, ten seeds, each at its own rate at that rank.\n"]
    for task in TITLES:
        by_rank = {rank: found(rows, task, rank) for rank in RANKS}
        names = [name for name in CONTENDERS if any(name in of_rank for of_rank in by_rank.values())]
        ranks = [rank for rank in RANKS if by_rank[rank]]
        lines = []
        for name in names:
            cells = [by_rank[rank].get(name) for rank in ranks]
            lines.append([label(name), *(with_interval(s.score, 100) if s else "" for s in cells)])
        if lines:
            parts.append(table([task, *(f"r = {rank}" for rank in ranks)], lines))
    return "\n".join(parts)


def _coverage(rows: Sequence[Row]) -> str:
    """What of the plan is there, and what it cost."""
    planned = dict.fromkeys(CELLS)
    complete = [cell for cell in planned if protocol.tested(rows, cell[0], cell[2], cell[1])]
    missing = [cell for cell in planned if cell not in complete]
    by_task = {
        task: sorted({rank for t, rank, _ in missing if t == task}) for task in dict.fromkeys(t for t, _, _ in missing)
    }
    still = "; ".join(f"{task} at r = {', '.join(map(str, ranks))}" for task, ranks in by_task.items() if ranks)
    hours = sum(row["seconds_init"] + row["seconds_train"] for row in rows) / 3600
    return (
        f"### What was run\n\n{len(rows)} runs, {hours:.1f} hours of one core without evaluation. "
        f"{len(complete)} of the plan's {len(planned)} cells (task, rank, contender) are complete; an incomplete "
        "one is in no table."
        + (f" Cells are missing for {still}. `python -m benchmarks.quality` goes on with them.\n" if still else "\n")
    )


LIMITS = """### What these tables do not show

- Large models, long runs, real instruction data. A tiny model in its first hundred steps is where a good start counts
  most; with four times the data less of the lead is left (sort-long), and with the paper's balance none
  (`python -m benchmarks.demo`). A model that is no toy: [text](text.md).
- The balance was suggested by an earlier experiment on three of these tasks, on other seeds and other test items; its
  forms were screened there, and nothing on this page chose among them.
- Intervals are over seeds: the order of the data, and the items that the start reads. All contenders share the test
  items, whose choice the intervals do not cover: 512 items have two points of standard error at 50 %.
- Processor seconds are of one thread of a shared machine: compare start and training within a row, not rows.
"""
