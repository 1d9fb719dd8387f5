"""What a user should conclude, in five sentences, each with the counts that it stands on."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.contenders import RESTARTED
from benchmarks.quality.plan import EVEN, LLAMA, OURS, PAPER, PEERS, TODAY
from benchmarks.quality.results import Row, read_rows
from benchmarks.quality.summary import Summary, by_protocol, paired

from .comparisons import RANKS, TITLES, Comparison, compare, counted, named
from .markdown import with_interval

SMALL = 16  # the largest rank that the second sentence counts as small


def section(file: Path) -> str:
    """The sentences; without runs beside LoRA nothing."""
    rows = read_rows(file)
    leads = compare(rows, (TODAY,), PEERS)
    over_lora = [c for c in leads if c.other == "LoRA"]
    if not over_lora:
        return ""
    others = [c for c in leads if c.other != "LoRA"]
    sentences = [
        f"**Against plain LoRA, each at its own rate, LoRA-One is {counted(over_lora)} cells of task and rank**, by "
        "intervals that hold for all comparisons of the table at once; level means that ten seeds do not tell them "
        "apart.",
        f"**Against rsLoRA, PiSSA, LoRA-GA and LoRA+ it is {counted(others)}**{_by_rank(others)}; which of them is "
        f"next differs from task to task. By the interval of one comparison alone it is behind {_behind(others)}.",
        _early(rows),
        _balance(rows),
        f"**All of this is of small models and short runs with AdamW**: {_restarted(rows)}and nothing here says what a "
        "7B model scores after an epoch.",
    ]
    numbered = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))
    return f"## What to conclude\n\n{numbered}\n"


def _by_rank(comparisons: Sequence[Comparison]) -> str:
    """How much of the lead is at small ranks."""
    small, large = ([c for c in comparisons if (c.rank <= SMALL) is wanted] for wanted in (True, False))
    if not small or not large:
        return ""
    return f": up to rank {SMALL} {counted(small)}, at higher ranks {counted(large)}"


def _behind(comparisons: Sequence[Comparison]) -> str:
    """Every loss by the uncorrected interval: the counts leave out those that the correction takes for chance."""
    found = [c for c in comparisons if c.alone.verdict == "behind"]
    told = [f"{c.other} in {c.place} ({with_interval(c.alone, 100, 1, '+')})" for c in found]
    return ", ".join(told) or "none of them"


def _early(rows: Sequence[Row]) -> str:
    """The lead of the first steps, and what the start costs."""
    first, sooner, share, cells = 0, 0, [], 0
    for found in _cells(rows, (TODAY, "LoRA")):
        ours, lora = found[TODAY], found["LoRA"]
        cells += 1
        first += ours.first.mean < lora.first.mean
        sooner += _seconds_to_goal(ours) < lora.seconds_init + lora.seconds_train
        share.append(ours.seconds_init / ours.seconds_train)
    return (
        f"**The lead comes early**: the mean loss of steps 1 to 20 is below LoRA's in {first} of "
        f"{cells} cells; but the start takes {100 * min(share):.0f} to {100 * max(share):.0f} % of the time of these "
        "short runs, which a longer one does not pay again, so that in seconds it is where LoRA ends sooner than LoRA "
        f"in {sooner} of {cells}."
    )


def _seconds_to_goal(summary: Summary) -> float:
    """Processor seconds to LoRA's final loss, the start included: the median of the seeds, infinite if never."""
    steps = [math.inf if step is None else step for step in summary.steps]
    return summary.seconds_init + summary.seconds_train * statistics.median(steps) / len(summary.rows[0]["losses"])


def _balance(rows: Sequence[Row]) -> str:
    comparisons = [c for c in compare(rows, OURS[1:], (PAPER,)) if c.name == EVEN]
    return (
        f"**The default shares the start between A and B in another way than the paper** (`balance=0`): against the "
        f"paper's form (`balance=0.5`) it is {counted(comparisons)}, ahead in {named(comparisons, 'ahead')}, and "
        f"behind {named(comparisons, 'behind')}."
    )


def _restarted(rows: Sequence[Row]) -> str:
    """What is left of the lead over LoRA when Adam forgets its first steps."""
    pairs = (TODAY, "LoRA"), (f"{TODAY}, {RESTARTED}", f"LoRA, {RESTARTED}")
    leads = []
    for task in LLAMA:
        found = by_protocol(rows, task, 32, [name for pair in pairs for name in pair])
        if len(found) < 4:
            continue
        plain, again = (paired(found[ours].rows, found[lora].rows, "score") for ours, lora in pairs)
        assert plain is not None and again is not None  # ten seeds each
        leads.append(f"from {with_interval(plain, 100, 1, '+')} to {with_interval(again, 100, 1, '+')} in {task}")
    if not leads:
        return ""
    return (
        "part of the lead is Adam's, since where its moments are reset after the warm-up, which helps every start, "
        f"the lead over LoRA at rank 32 goes {' and '.join(leads)}; "
    )


def _cells(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Summary]]:
    """The cells of task and rank in which all of these are complete."""
    found = (by_protocol(rows, task, rank, names) for task in TITLES for rank in RANKS)
    return [summaries for summaries in found if len(summaries) == len(names)]
