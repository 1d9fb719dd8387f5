"""How A and B share the start: the comparison, its cause, and the preconditioner with A far from zero."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.contenders import RESTARTED
from benchmarks.quality.plan import EVEN, INTERVENTIONS, LLAMA, OURS, PAPER, PRECONDITIONED, RESTARTS
from benchmarks.quality.results import Row, read_rows
from benchmarks.quality.summary import by_protocol, mean, paired

from .comparisons import compare, variants_table
from .markdown import paragraph, signed, table, with_interval

HOW = """## How A and B share the start

`Config(balance=p)` leaves the start's product B0 A0 as it is and shares it otherwise: the rows of A0 are
r^(1/2 - p) (S_i / S_1)^p / sqrt(gamma) long, B0 has the rest. p = 0.5 is the paper's form, half to each. At p = 0 all
rows of A0 are equally long, sqrt(r / gamma), which at rank 32 is about what plain LoRA's are (0.50 and 0.58).
"Balance 0.25, gamma 64" is between them with a larger step. The point of it is the trailing rows: at r = 32 S_32 / S_1
is below .03 on these tasks, so that with p = 0.5 rows of A and columns of B start near zero.

Points over the paper's form, each at its own rate:

"""
CAUSE = """### Why: the first steps, changed by hand

If the trailing rows are lost because Adam's first steps are larger than they are, then keeping A from going far at
first must bring back what the other balance brings, with the paper's start untouched; and what brings the points back
must bring back directions as well. Each intervention has its own sweep of rates. *A moved*: |A - A0| / |A0| after 10
steps, mean over the layers. *Directions*: exp of the entropy of the singular values' shares in the whole update at the
end, mean over the layers.

"""
PRECONDITIONER = """### The preconditioner, with A far from zero

With rows of A near zero the r x r preconditioner (A A^T + reg I)^-1 has huge entries, one reason why it does harm under
AdamW ([the preconditioner](preconditioner.md)). With balance 0 A A^T begins as a multiple of I. So the same question
again, at balance 0: `before` Adam's moments as the paper writes it, at the end (`after`), or with the second moment in
the coordinates in which P is 1 (`basis`); reg absolute, or relative to the Gram matrix's mean eigenvalue. Points over
plain AdamW from the same start:

"""


def section(file: Path) -> str:
    """All of it, as far as there are runs."""
    rows = read_rows(file)
    return "\n".join(part for part in (_compared(rows), _causes(rows), _preconditioned(rows)) if part)


def _compared(rows: Sequence[Row]) -> str:
    comparisons = compare(rows, OURS[1:], (PAPER,))
    if not comparisons:
        return ""
    return HOW + f"{variants_table(comparisons, OURS[1:])}\n" + _losses(rows)


def _losses(rows: Sequence[Row]) -> str:
    """Test losses of the two forms by task and rank: what the score cannot tell apart."""
    lines = []
    for comparison in compare(rows, (EVEN,), (PAPER,)):
        found = by_protocol(rows, comparison.task, comparison.rank, OURS)
        even, paper = found[EVEN], found[PAPER]
        difference = paired(even.rows, paper.rows, "test_loss")
        assert difference is not None
        cells = [f"{s.rate:g}: {with_interval(s.test_loss, 1, 3)}" for s in (paper, even)]
        ranks = [f"{mean(s.rows, 'update_rank'):.1f}" for s in (paper, even)]
        moved = [f"{mean(s.rows, 'moved'):.2f}" for s in (paper, even)]
        lines.append([f"{comparison.task}, r = {comparison.rank}", *cells, signed(difference, 1, 3), *moved, *ranks])
    header = ["", "balance 0.5: rate, test loss", "balance 0: rate, test loss", "difference"]
    header += ["A moved, 0.5", "A moved, 0", "directions, 0.5", "directions, 0"]
    return (
        "Test losses, with the rates; **bold** where a 95 % interval of the difference by seed leaves out 0, "
        "uncorrected. *A moved* and *directions* are explained below.\n\n" + table(header, lines)
    )


def _causes(rows: Sequence[Row]) -> str:
    names = {PAPER: "the paper's start", EVEN: "balance 0"}
    names |= {name: f"the paper's start, {name.removeprefix(PAPER + ', ')}" for name in INTERVENTIONS}
    names |= {name: name.removeprefix("LoRA-One, ") for name in ("LoRA", *RESTARTS) if name not in names}
    lines = _against_first(rows, LLAMA, 32, names)
    if len(lines) <= 4:
        return ""
    header = ["r = 32", "rate", "exact match, %", "points over the paper's", "test loss", "A moved", "directions"]
    return CAUSE + table(header, lines) + f"\n{_what_they_brought(rows)}\n"


def _what_they_brought(rows: Sequence[Row]) -> str:
    """Which interventions are ahead of the paper's start, or behind it, in any task."""
    found: dict[str, list[str]] = {"ahead": [], "behind": []}
    for task in LLAMA:
        of_task = by_protocol(rows, task, 32, (PAPER, *INTERVENTIONS))
        for name, summary in of_task.items():
            lead = paired(summary.rows, of_task[PAPER].rows, "score") if PAPER in of_task else None
            if lead is not None and lead.verdict != "level":
                found[lead.verdict].append(f"{name.removeprefix(PAPER + ', ')} ({task})")
    ahead, behind = (", ".join(names) or "none" for names in found.values())
    return paragraph(
        f"By intervals of 95 %, uncorrected, ahead of the paper's start: {ahead}; behind it: {behind}. "
        + _restarts(rows)
    )


def _restarts(rows: Sequence[Row]) -> str:
    """What a restart of Adam brings each start over the same without it."""
    brought = []
    for task, base in itertools.product(LLAMA, ("LoRA", PAPER, EVEN)):
        found = by_protocol(rows, task, 32, (base, f"{base}, {RESTARTED}"))
        if len(found) == 2:
            plain, restarted = (summary.rows for summary in found.values())
            lead = paired(restarted, plain, "score")
            assert lead is not None
            brought.append(f"{base} {with_interval(lead, 100.0, 1, '+')} points ({task})")
    if not brought:
        return ""
    return (
        f"A restart when the warm-up ends brings {', '.join(brought)}: Adam then forgets the large gradients of the "
        "first steps, which its second moments would carry for the whole of so short a run."
    )


def _preconditioned(rows: Sequence[Row]) -> str:
    names = {EVEN: "plain AdamW"} | {name: name.removeprefix(EVEN + ", ") for name in PRECONDITIONED}
    lines = _against_first(rows, LLAMA, 8, names)
    if len(lines) <= 2:
        return ""
    header = ["r = 8, balance 0", "rate", "exact match, %", "points over plain", "test loss", "A moved", "directions"]
    ahead = []
    for name in PRECONDITIONED:
        cells = [by_protocol(rows, task, 8, (EVEN, name)) for task in LLAMA]
        leads = [paired(found[name].rows, found[EVEN].rows, "score") for found in cells if len(found) == 2]
        if all(lead is not None and lead.verdict == "ahead" for lead in leads):
            ahead.append(name.removeprefix(EVEN + ", "))
    best = ", ".join(ahead) or "none, so `lora_one.optimizer` stays plain"
    verdict = f"Ahead of plain AdamW on every task: {best}.\n"
    return PRECONDITIONER + table(header, lines) + f"\n{verdict}"


def _against_first(rows: Sequence[Row], tasks: Sequence[str], rank: int, names: dict[str, str]) -> list[list[str]]:
    """A line for each contender that is there, compared with the first one by seed."""
    lines = []
    for task in tasks:
        found = by_protocol(rows, task, rank, tuple(names))
        first = found.get(next(iter(names)))
        for name, summary in found.items():
            lead = None if first is None or summary is first else paired(summary.rows, first.rows, "score")
            lines.append(
                [
                    f"{task}: {names[name]}",
                    f"{summary.rate:g}",
                    with_interval(summary.score, 100),
                    "" if lead is None else signed(lead),
                    with_interval(summary.test_loss, 1, 3),
                    f"{mean(summary.rows, 'moved'):.2f}",
                    f"{mean(summary.rows, 'update_rank'):.1f}",
                ]
            )
    return lines
