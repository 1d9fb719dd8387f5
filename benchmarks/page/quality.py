"""Fine-tuning quality: a table and a picture a task."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.results import Interval, Row, read_rows, select
from benchmarks.quality.summary import Summary, paired, summarize

from .markdown import table, with_interval

# In the order of the page; the order of a table's rows is CONTENDERS'.
TITLES = {
    "sort": "The embedded Llama: sort letters",
    "sort-long": "The same for longer: 200 steps of batch 32",
    "desc": "The embedded Llama, a harder shift: sort letters descending, in upper case",
    "t5": "A tiny T5, text to text: the largest letter, in upper case",
    "minilm": "A pretrained encoder (MiniLM): in which order are the words of a docstring",
}
CONTENDERS = (
    "full fine-tuning",
    "LoRA",
    "rsLoRA",
    "PiSSA",
    "LoRA-GA",
    "LoRA+",
    "LoRA-One",
    "LoRA-One, exact gradient",
    "LoRA-One, gamma auto",
    "LoRA-One, gamma 16",
    "LoRA-One, B at 4x the rate",
    "LoRA-One, B at 16x the rate",
    "LoRA-One, preconditioned",
)
RANKS = (4, 8, 32)

HOW = """## Fine-tuning quality

`python -m benchmarks.quality` makes the runs; `benchmarks/results/quality.json` holds every one of them with its whole
loss curve. A run is short (100 steps of batch 16), on one thread, in float32, by AdamW without
weight decay on a linear schedule after 10 steps of warm-up. Within a seed all contenders see the same batches. LoRA,
rsLoRA, PiSSA, LoRA-GA and LoRA+ are PEFT's own, alpha 16 (PiSSA: r), each with its paper's settings; LoRA-One is
`lora_one.init` and `lora_one.optimizer`, with rsLoRA's scale and plain AdamW. Its rows were made by four passes over
the batches. Today's default is one pass: [what that changes](#ablations).

Every contender has a sweep of its own over learning rates 1, 2, 5, 10, ... times a power of ten, five at least, which
goes on while the best is at an edge; the best is the one of least loss on a validation set at seed 0. Then come more
seeds at that rate, and the test set. ± is the half width of a 95 % interval by Student's t over seeds; a value without
it is of one seed; a rate marked (edge) is of a sweep that is not finished. *Steps to LoRA's loss*: the first step at
which the mean of the last ten training losses is at or below what LoRA, with the same seed, ends with; in brackets how
many times fewer that is than LoRA took. *Seconds* are processor seconds: of the start, and of the training; *seconds to
it* include the start.
"""


def summaries(rows: Sequence[Row], task: str, rank: int) -> list[Summary]:
    """Every contender that has runs, in the page's order."""
    reference = summarize(rows, task, "LoRA", rank, None)
    found = [summarize(rows, task, name, rank, reference) for name in CONTENDERS]
    return [summary for summary in found if summary]


def score_name(task: str) -> str:
    """What the score of a task is the share of."""
    return "accuracy" if task.startswith("minilm") else "exact match"


def section(file: Path, heads: Path) -> str:
    """All tasks; of the one with a new head (heads.json), what the head alone can do."""
    rows = read_rows(file)
    if not rows:
        return ""
    parts = [HOW, _machine(rows), _verdict(rows)]
    notes = {"minilm": _head_alone(heads)}
    parts += [_task(rows, task, notes.get(task, "")) for task in TITLES if summaries(rows, task, 8)]
    parts += [_ranks(rows), _coverage(rows), LIMITS]
    return "\n".join(part for part in parts if part)


def _machine(rows: Sequence[Row]) -> str:
    versions = sorted({(row["python"], row["torch"]) for row in rows})
    return "Made with " + "; ".join(f"Python {python}, torch {torch}" for python, torch in versions) + ".\n"


def _verdict(rows: Sequence[Row]) -> str:
    """LoRA-One against each peer, paired by seed, in points of the score."""
    peers = ("LoRA", "rsLoRA", "PiSSA", "LoRA-GA", "LoRA+", "full fine-tuning")
    lines = []
    for rank, task in itertools.product((8, 4, 32), TITLES):
        found = {summary.name: summary for summary in summaries(rows, task, rank)}
        if "LoRA-One" not in found:
            continue
        cells = []
        for peer in peers:
            difference = paired(found["LoRA-One"].rows, found[peer].rows, "score") if peer in found else None
            cells.append("" if difference is None else signed(difference))
        lines.append([f"{task}, r = {rank}", *cells])
    return (
        "### LoRA-One's lead, in points, by seed\n\n"
        "Each at its best rate; **bold** where the interval leaves out 0.\n\n"
    ) + table(["", *(f"over {peer}" for peer in peers)], lines)


def signed(difference: Interval, scale: float = 100.0, digits: int = 1) -> str:
    """A difference, in points unless another scale is given; bold where its interval leaves out 0."""
    text = with_interval(difference, scale, digits, "+")
    return f"**{text}**" if abs(difference.mean) > difference.half else text


def _head_alone(file: Path) -> str:
    """What the fitted head is right in, from which every contender goes on."""
    if not file.exists():
        return ""
    share = json.loads(file.read_text())["fitted_head_alone"]
    return f"The fitted head alone, from which all go on, is right in {100 * share:.1f} %.\n\n"


def _task(rows: Sequence[Row], task: str, note: str) -> str:
    found = summaries(rows, task, 8)
    steps = len(found[0].rows[0]["losses"])
    lines = [
        [
            _label(s),
            f"{s.rate:g}{' (edge)' if s.edge else ''}",
            str(s.score.count),
            with_interval(s.score, 100),
            with_interval(s.test_loss, 1, 3),
            with_interval(s.first, 1, 2),
            _steps(s, steps),
            _seconds(s, steps),
            f"{s.seconds_init:.1f} + {s.seconds_train:.1f}",
        ]
        for s in found
    ]
    header = [
        "rank 8",
        "rate",
        "seeds",
        f"{score_name(task)}, %",
        "test loss",
        "loss of steps 1-20",
        "steps to LoRA's loss",
        "seconds to it",
        "seconds",
    ]
    return (
        f"### {TITLES[task]}\n\n{note}{table(header, lines)}\n"
        f"![Loss against steps and time](../images/quality-{task}.png)\n\n" + _sweeps(rows, task, found)
    )


def _label(summary: Summary) -> str:
    """The name; of gamma="auto" also what it chose."""
    if not summary.name.endswith("gamma auto"):
        return summary.name
    return f"{summary.name}: {', '.join(f'{gamma:g}' for gamma in sorted({row['gamma'] for row in summary.rows}))}"


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


def _sweeps(rows: Sequence[Row], task: str, found: Sequence[Summary]) -> str:
    """Validation loss at seed 0 by rate: the sweep that chose each rate."""
    mine = select(rows, task=task, group="main", rank=8, seed=0)
    rates = sorted({row["rate"] for row in mine})
    lines = []
    for summary in found:
        by_rate = {row["rate"]: row["valid_loss"] for row in select(mine, contender=summary.name)}
        cells = [_loss(by_rate.get(rate), rate == summary.rate) for rate in rates]
        lines.append([summary.name, *cells])
    return (
        "<details><summary>The sweeps: validation loss by learning rate, seed 0</summary>\n\n"
        + table(["", *(f"{rate:g}" for rate in rates)], lines)
        + "\n</details>\n"
    )


def _loss(value: float | None, best: bool) -> str:
    if value is None:
        return ""
    text = "diverged" if math.isnan(value) else f"{value:.3f}"
    return f"**{text}**" if best else text


def _ranks(rows: Sequence[Row]) -> str:
    others = {row["rank"] for row in select(rows, group="main")} - {8}
    if not others:
        return ""
    parts = ["### By rank\n\nTest score in %, seeds in brackets, each at its own best rate at that rank.\n"]
    for task in TITLES:
        by_rank = {rank: {s.name: s for s in summaries(rows, task, rank)} for rank in RANKS}
        names = [name for name in CONTENDERS if any(name in by_rank[rank] for rank in RANKS if rank != 8)]
        if not names:
            continue
        lines = []
        for name in names:
            cells = [by_rank[rank].get(name) for rank in RANKS]
            lines.append([name, *(f"{with_interval(s.score, 100)} ({s.score.count})" if s else "" for s in cells)])
        parts.append(table([task, *(f"r = {rank}" for rank in RANKS)], lines))
    return "\n".join(parts)


def _coverage(rows: Sequence[Row]) -> str:
    """What of the full plan is there: contenders x tasks with their rates and seeds."""
    lines = []
    for name in CONTENDERS:
        cells = []
        for task in TITLES:
            found = {s.name: s for s in summaries(rows, task, 8)}.get(name)
            cells.append(f"{found.swept} rates, {found.score.count} seeds" if found else "not run")
        lines.append([name, *cells])
    return (
        f"### What was run\n\n{len(rows)} runs. Below is rank 8; the full plan is every cell with five rates and five "
        "seeds, at ranks 4, 8 and 32. `python -m benchmarks.quality` goes on from the rows that are there.\n\n"
        + table(["", *TITLES], lines)
    )


LIMITS = """### What these tables do not show

- Large models, long runs, real instruction data. A tiny model in its first hundred steps is where a good start counts
  most; a longer run of the same task ends with LoRA-One level with a tuned LoRA (`python -m benchmarks.demo`).
- A rate is chosen at one seed, from a ladder whose steps are factors of 2 and 2.5: differences of a point or two
  between neighbours can be the ladder's.
- The LoRA-One variants with other rates for B, or other gammas, were tried because we looked for what helps LoRA-One;
  the peers got their papers' settings. Read them as ablations, not as contenders.
- Processor seconds are of one thread of a shared machine, up to 1.7 times faster for some rows than for others: compare
  start and training within a row, not rows. These starts read eight batches four times: in runs this short
  that is a third of the training, so that fewer steps to LoRA's loss are not fewer seconds. A start of one batch costs
  an eighth of that (see the ablations), and a longer run does not pay more.
- A seed changes the score by several points (the order of the data, the items that the start reads): three to five
  seeds tell a lead of ten points, not one of two; MiniLM's differ by less. The test sets have 256 items, three points
  of standard error at 50 %, MiniLM's 1024, one and a half; all contenders share them.
"""
