"""docs/evidence/preconditioner.md and its picture, from the rows in results/preconditioner.json."""

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .plan import PLACES, RANKS
from .rules import Rule
from .sweep import Cell, Results, loss_of, rule_of
from .tasks import LLAMA, RANK, TASKS
from .training import JOBS

DOCS = Path(__file__).parents[2] / "docs"
OPTIMIZERS = {"adam": "Adam", "momentum": "momentum SGD"}
JOB_NAMES = {"screen": "short", "full": "full"}
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
`lora_one.init` with the paper's balance ([today's](quality.md#the-preconditioner-with-a-far-from-zero) was tried too),
clip the gradient's norm at 1, and change the rate linearly after 10 steps of warm-up. Every rule has its own learning
rate: a climb over half decades that ends below both neighbours, by held-out loss.

Tasks: the embedded Llama's two (*main*: sort, *harder*: sort descending in upper case), and regression on a shift of
rank 4 and condition number 100 in 64 x 64, linear and through a ReLU, {full.steps} full-batch steps. Regression starts
as the theory does, from the gradient itself (`scale="gradient"`), and once more from the default start, which is small
(*gamma 128*), at r = 8, twice the rank of the shift: half of the pair has nothing to begin with.

{verdict}

With growing reg `before` tends to plain Adam, which does not see a scale. Where P has helped, and how much: the least
loss at any damping over plain's, below 1 is better, and in brackets at how many of the dampings that were run it is
below 1.

{places}

## The best of them, by seeds

The embedded Llama: plain Adam and the best places of the table below, each at its best rate in quarter decades, chosen
by seed 0; (edge): its climb is not finished. Mean over the seeds, and their standard deviation; *below plain*: with how
many seeds, each rule at its own rate. The short job is {screen.steps} steps of batch {screen.batch_size}, the full one
{full.steps} of {full.batch_size}.

{finals}

Over both tasks, pairs of runs with the same task and seed, the loss over plain's (geometric mean): at the end, on
held-out data, and the mean training loss of the first 20 steps.

{pairs}

## Adam

Held-out loss at the best rate, and that rate; one seed. The Llama for {screen.steps} steps of batch
{screen.batch_size}. The Llama and *gamma 128* at r = 8, the theory's setting at r = 4, the rank of the shift. Bold:
less than plain.

{adam}

![Loss at the best rate against reg](../images/preconditioner.png)

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


def make_page(results: Results) -> str:
    """The page's text, a function of the rows alone."""
    return PAGE.format(
        verdict=verdict(results),
        places=places_table(results),
        finals=finals(results),
        pairs=pairs_table(results),
        adam=sweep_table(results, "adam", RANK),
        momentum=sweep_table(results, "momentum", RANK),
        ranks="\n\n".join(rank_table(results, rank) for rank in (4, 8, 32)),
        count=len(results.rows),
        **{name: job for name, job in JOBS.items()},
    )


def write(results: Results, docs: Path = DOCS) -> None:
    """The page and the picture."""
    (docs / "evidence" / "preconditioner.md").write_text(make_page(results))
    draw(results).savefig(docs / "images" / "preconditioner.png", dpi=110)


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
    """The answer, and what follows from it for `lora_one.optimizer`, from the numbers."""
    lines = []
    for optimizer, name in OPTIMIZERS.items():
        winners = beating_plain(results, optimizer)
        if winners:
            lines.append(f"**Ahead of plain {name} on every task: {'; '.join(rule.name for rule in winners)}.**")
        else:
            lines.append(f"**No rule that was run is ahead of plain {name} on every task.**")
    if beating_plain(results, "adam"):
        lines.append("\nBy that, it should be what `lora_one.optimizer` does by default.")
    else:
        lines.append("\nSo `lora_one.optimizer` is plain unless asked.")
    return "\n".join(lines)


def places_table(results: Results) -> str:
    """Optimizer and place by task: the least loss over plain's, and how many dampings are below plain."""
    lines = [f"| | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    for optimizer, name in OPTIMIZERS.items():
        for place in PLACES[optimizer]:
            chosen = [rule for rule in rules_in(results, optimizer) if rule.place == place]
            cells = [ratio_cell(ratios(results, task, chosen)) for task in TASKS]
            if any(cells):
                lines.append(f"| {name}: {place} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(results: Results, task: str, chosen: Iterable[Rule]) -> list[float]:
    """Each rule's loss over the plain one's, both at their best rates; of those that were run."""
    found = []
    for rule in chosen:
        rows = [results.best(Cell(job_of(task), task, RANK[task], r)) for r in (rule, plain_of(rule))]
        if None not in rows:
            found.append(loss_of(rows[0]) / loss_of(rows[1]))  # type: ignore[arg-type]
    return found


def ratio_cell(found: list[float]) -> str:
    """The least of them, and how many are below 1."""
    return f"{min(found):.3g} ({sum(x < 1 for x in found)} of {len(found)})" if found else ""


def plain_of(rule: Rule) -> Rule:
    """The rule without a preconditioner."""
    return Rule(rule.optimizer)


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
    lines = ["| job | task | r | | rate | seeds | held-out loss | below plain | exact match, % |", "|---" * 9 + "|"]
    for job, rank, task, rule in seeded(results):
        rows = at_best_rate(results, Cell(job, task, rank, rule))
        plain = at_best_rate(results, Cell(job, task, rank, plain_of(rule)))
        both = rows.keys() & plain.keys() if rule.place != "none" else set()
        below = f"{sum(loss_of(rows[seed]) < loss_of(plain[seed]) for seed in both)} of {len(both)}" if both else ""
        losses = spread([loss_of(row) for row in rows.values()], ".3f")
        matches = spread([100 * row["exact_match"] for row in rows.values() if row["exact_match"] is not None], ".1f")
        lines.append(
            f"| {JOB_NAMES[job]} | {task} | {rank} | {rule.name} | {climbed(results, rows[0])} | {len(rows)} "
            f"| {losses} | {below} | {matches} |"
        )
    return "\n".join(lines)


def pairs_table(results: Results) -> str:
    """Job, rank and rule: over the runs that share task and seed with a plain one, the mean ratios of losses."""
    lines = ["| job | r | | pairs | below plain | loss at the end | of the first 20 steps |", "|---" * 7 + "|"]
    found: dict[tuple[str, int, Rule], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for job, rank, task, rule in seeded(results):
        if rule.place != "none":
            rows = at_best_rate(results, Cell(job, task, rank, rule))
            plain = at_best_rate(results, Cell(job, task, rank, plain_of(rule)))
            pairs = found.setdefault((job, rank, rule), [])
            pairs += [(rows[seed], plain[seed]) for seed in sorted(rows.keys() & plain.keys())]
    for (job, rank, rule), pairs in found.items():
        if pairs:
            end, first = (
                statistics.geometric_mean([measure(ours) / measure(theirs) for ours, theirs in pairs])
                for measure in (loss_of, loss_first)
            )
            below = sum(loss_of(ours) < loss_of(theirs) for ours, theirs in pairs)
            lines.append(
                f"| {JOB_NAMES[job]} | {rank} | {rule.name} | {len(pairs)} | {below} | {end:.2f} | {first:.2f} |"
            )
    return "\n".join(lines)


def seeded(results: Results) -> Iterator[tuple[str, int, str, Rule]]:
    """(job, rank, task, rule) of what was run on the Llama with several seeds or in the full job."""
    for job, rank, task, rule in itertools.product(JOBS, RANKS, LLAMA, rules_in(results, "adam")):
        count = len(at_best_rate(results, Cell(job, task, rank, rule)))
        if count > 1 or (job == "full" and count):
            yield job, rank, task, rule


def at_best_rate(results: Results, cell: Cell) -> dict[int, dict[str, Any]]:
    """The rows of a cell at its best rate, by seed."""
    best = results.best(cell)
    rows = [] if best is None else [r for r in results.rows if same_cell(r, best) and r["rate"] == best["rate"]]
    return {row["seed"]: row for row in rows}


def climbed(results: Results, best: dict[str, Any]) -> str:
    """The best rate, and whether a neighbour on either side was tried."""
    rates = {row["rate"] for row in results.rows if same_cell(row, best)}
    return f"{best['rate']:.2g}" + (" (edge)" if best["rate"] in (min(rates), max(rates)) else "")


def loss_first(row: dict[str, Any]) -> float:
    """The mean training loss of the first 20 steps; infinite where the run diverged."""
    return math.inf if row["loss_first_20"] is None else row["loss_first_20"]


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
