"""docs/preconditioner.md and its picture, from the rows in results/preconditioner.json."""

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .plan import PLACES
from .rules import Rule
from .sweep import Cell, Results, loss_of, rule_of
from .tasks import LLAMA, RANK, TASKS
from .training import JOBS

DOCS = Path(__file__).parents[2] / "docs"
PLACE_COLORS = {"before": "tab:red", "mean": "tab:purple", "after": "tab:blue", "basis": "tab:green"}

PAGE = """# Does preconditioning pay?

Written by `python -m benchmarks.preconditioner --report` from `benchmarks/results/preconditioner.json`.

The paper preconditions LoRA's gradients by P, gA <- (B^T B + reg I)^-1 gA and gB <- gB (A A^T + reg I)^-1, and hands
them to AdamW. For gradient descent P is decisive ([the theory](theory.md)). For AdamW, which already divides by the
root of the second moment, it is a question of measurement, of where in the step P acts, and of how strongly it is
damped:

| place | the step |
|---|---|
| none | plain |
| before | the moments are those of P g (the paper, PEFT) |
| mean | P times the first moment of g, over the root of the second moment of g |
| after | P times the finished direction |
| basis | the second moment is that of P^1/2 g: the step is P^1/2 (P^1/2 m / sqrt(v)) |

reg is absolute, as in the paper, or relative to the mean eigenvalue of each r x r Gram matrix. All runs start from
`lora_one.init`, clip the gradient's norm at 1, and change the rate linearly after 10 steps of warm-up. Every rule has
its own learning rate: a climb over half decades that ends below both neighbours, by held-out loss.

Tasks: the embedded Llama's two (*main*: sort, *harder*: sort descending in upper case), and regression on a shift of
rank 4 and condition number 100 in 64 x 64, linear and through a ReLU, {full.steps} full-batch steps. Regression starts
as the theory does, from the gradient itself (`scale="gradient"`), and once more from the default start, which is small
(*gamma 128*).

{verdict}

So `lora_one.optimizer` stays plain unless asked. What the tables say, as far as they go:

- Before the moments, where the paper and PEFT have it, P does harm to the Llama at every damping that was run. The more
  reg, the less harm: in the limit it is plain Adam.
- `basis` with relative reg 1 is ahead of plain Adam on both Llama tasks in the short job, with every seed, and ends
  level with it at full length (one seed; on the harder task one rate): it is faster over the first steps.
- In the theory's setting, from the gradient itself and at the shift's own rank, the paper's form wins: by orders of
  magnitude with momentum SGD and, in the linear case, with Adam. From the default start and at twice that rank it
  loses: half of the pair starts at zero there. `basis` with relative reg 1 does not win on regression.

## The best of them, by seeds

The embedded Llama, r = 8: plain Adam and the best places of the table below, each at its best rate in quarter decades,
chosen by seed 0. Mean over the seeds, and their standard deviation. The short job is {screen.steps} steps of batch
{screen.batch_size}, the full one {full.steps} of {full.batch_size}.

{finals}

## Adam

Held-out loss at the best rate, and that rate; one seed. The Llama for {screen.steps} steps of batch
{screen.batch_size}. The Llama and *gamma 128* at r = 8, the theory's setting at r = 4, the rank of the shift. Bold:
less than plain.

{adam}

![Loss at the best rate against reg](preconditioner.png)

## Other ranks

The best damping of each place above.

{ranks}

## Momentum SGD (0.9)

As the table for Adam.

{momentum}

## What this does not show

One 0.9 M parameter model and two kinds of regression; single seeds but for the first table; {count} runs in all.
The climb over the rate finds a local minimum. A cell without a number, and a reg that is not listed, was not run:
`python -m benchmarks.preconditioner` goes on from here.
"""


def write(results: Results, docs: Path = DOCS) -> None:
    """The page and the picture."""
    text = PAGE.format(
        verdict=verdict(results),
        finals=finals(results),
        adam=sweep_table(results, "adam", RANK),
        momentum=sweep_table(results, "momentum", RANK),
        ranks="\n\n".join(rank_table(results, rank) for rank in (4, 8, 32)),
        count=len(results.rows),
        **{name: job for name, job in JOBS.items()},
    )
    (docs / "preconditioner.md").write_text(text)
    draw(results).savefig(docs / "preconditioner.png", dpi=110)


def job_of(task: str) -> str:
    """The job in which all rules were compared."""
    return "screen" if task in LLAMA else "full"


def beating_plain(results: Results, optimizer: str) -> list[Rule]:
    """The rules with a lower loss than the plain optimizer, each at its best rate, on every task."""

    def better(rule: Rule, task: str) -> bool:
        both = (rule, Rule(optimizer))  # type: ignore[arg-type]
        rows = [results.best(Cell(job_of(task), task, RANK[task], r)) for r in both]
        return None not in rows and loss_of(rows[0]) < loss_of(rows[1])  # type: ignore[arg-type]

    return [rule for rule in rules_in(results, optimizer) if all(better(rule, task) for task in TASKS)]


def verdict(results: Results) -> str:
    """The answer, from the numbers."""
    lines = []
    for optimizer, name in (("adam", "Adam"), ("momentum", "momentum SGD")):
        winners = beating_plain(results, optimizer)
        if winners:
            lines.append(f"**Ahead of plain {name} on every task: {'; '.join(rule.name for rule in winners)}.**")
        else:
            lines.append(f"**No rule that was run is ahead of plain {name} on every task.**")
    return "\n".join(lines)


def rules_in(results: Results, optimizer: str | None = None) -> list[Rule]:
    """The rules that were run, plain first, in the order of place, damping and reg."""
    places = ["none", *PLACES["adam"]]
    found = [rule for rule in {rule_of(row) for row in results.rows} if optimizer in (None, rule.optimizer)]
    return sorted(found, key=lambda r: (r.optimizer, places.index(r.place), r.damping, r.reg))


def sweep_table(results: Results, optimizer: str | None, ranks: dict[str, int]) -> str:
    """Rules by tasks, each at its rank: the least loss, and its rate."""
    lines = [f"| | {' | '.join(ranks)} |", "|---" * (len(ranks) + 1) + "|"]
    for rule in rules_in(results, optimizer):
        cells = []
        for task, rank in ranks.items():
            row = results.best(Cell(job_of(task), task, rank, rule))
            plain = results.best(Cell(job_of(task), task, rank, Rule(rule.optimizer)))
            cells.append("" if row is None else cell(row, plain))
        if any(cells):
            name = rule.name if optimizer else f"{rule.optimizer}: {rule.name}"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rank_table(results: Results, rank: int) -> str:
    """The tasks that were compared at another rank."""
    return f"r = {rank}:\n\n{sweep_table(results, None, {task: rank for task in TASKS if RANK[task] != rank})}"


def cell(row: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """Loss (rate), bold if less than the plain optimizer's."""
    if row["loss"] is None:
        return "diverged"
    loss = f"{row['loss']:.3g}"
    if plain is not None and loss_of(row) < loss_of(plain):
        loss = f"**{loss}**"
    return f"{loss} ({row['rate']:.2g})"


def finals(results: Results) -> str:
    """The rules that were run with several seeds or in the full job."""
    lines = ["| job | task | | rate | seeds | held-out loss | exact match, % |", "|---" * 7 + "|"]
    for job, task, rule in itertools.product(JOBS, LLAMA, rules_in(results, "adam")):
        best = results.best(Cell(job, task, RANK[task], rule))
        rows = [] if best is None else [r for r in results.rows if same_cell(r, best) and r["rate"] == best["rate"]]
        if best is None or (job == "screen" and len(rows) == 1):
            continue
        losses = spread([loss_of(row) for row in rows], ".3f")
        matches = spread([100 * row["exact_match"] for row in rows if row["exact_match"] is not None], ".1f")
        name = {"screen": "short"}.get(job, job)
        lines.append(f"| {name} | {task} | {rule.name} | {best['rate']:.2g} | {len(rows)} | {losses} | {matches} |")
    return "\n".join(lines)


def same_cell(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows differ in rate and seed at most."""
    keys = ("job", "task", "rank", "optimizer", "place", "damping", "reg")
    return all(row[key] == other[key] for key in keys)


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def draw(results: Results) -> Figure:
    """A panel a task: the least loss of each place of Adam's against reg, absolute in solid lines, relative dashed."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    for task, axes in zip(TASKS, figure.subplots(1, len(TASKS)), strict=True):
        plain = results.best(Cell(job_of(task), task, RANK[task], Rule("adam")))
        if plain is not None:
            axes.axhline(loss_of(plain), color="black", lw=1, label="none")
        for place, damping, points in curves(results, task):
            style = {"color": PLACE_COLORS[place], "ls": "-" if damping == "absolute" else "--"}
            label = place if damping == "absolute" else None
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1, label=label, **style)
        axes.set(xscale="log", yscale="log", xlabel="reg", title=task)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("held-out loss at the best rate")
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


def curves(results: Results, task: str) -> Iterator[tuple[str, str, Iterable[tuple[float, float]]]]:
    """(place, damping, [(reg, loss)]) of the rules with a finite loss on a task."""
    for place in PLACES["adam"]:
        for damping in ("absolute", "relative"):
            rows = [
                (rule.reg, results.best(Cell(job_of(task), task, RANK[task], rule)))
                for rule in rules_in(results, "adam")
                if (rule.place, rule.damping) == (place, damping)
            ]
            points = [(reg, loss_of(row)) for reg, row in rows if row is not None and math.isfinite(loss_of(row))]
            if points:
                yield place, damping, points
