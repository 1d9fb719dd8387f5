"""docs/evidence/text.md: adaptation of a pretrained decoder, of the results of `python -m benchmarks.text`."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.protocol import validation
from benchmarks.quality.results import interval
from benchmarks.quality.summary import paired
from benchmarks.text.sizes import THINNED
from benchmarks.text.summary import Summary, summarize

from .markdown import signed, sweeps, table, with_interval

RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "text.md"
FILES = {"full": "text.json", "smoke": "text_smoke.json"}
TITLES = {"full": "On a GPU", "smoke": "The small version, on a CPU"}
TASKS = {"cpp": "to C and C++", "summaries": "to summaries of functions"}
REFERENCE = "LoRA"

INTRODUCTION = """# Adaptation of a decoder to another kind of text

`python -m benchmarks.text` pretrains a decoder on Python sources and documentation, and then adapts it to a shift of
domain. This page is made of its results by `python -m benchmarks.page`.

"""
NOT_RUN = """**It has not been run on a GPU yet.** What is below is the small version, whose model is tiny. It
shows that the command does what it says, and next to nothing about models that people fine-tune.

"""
HOW = """## What is done

1. **Text.** Every machine has some: the sources and documentation of the Python packages installed on it. Only packages
   with permissive licences are read, by their metadata. The pack of text travels to the GPU in one compressed file.
2. **Pretraining.** A Llama of 46M parameters, with a byte-level BPE, learns from random windows of Python. It never
   sees C++. The small version has a million parameters.
3. **Adaptation.** *cpp* is the sources of another language, C and C++ from the same packages. Every token counts, so
   few held-out items tell small differences. *summaries* is a function without its docstring, to be followed by the
   docstring's first line. There only the line counts, and held-out functions are of packages of their own.
4. **Contenders.** Full fine-tuning, LoRA, rsLoRA, LoRA+ and LoRA-GA are those of [the quality page](quality.md).
   LoRA-One starts in one pass over its batches, with the two [balances](quality.md#how-a-and-b-share-the-start).
   *Deferred* reads none: the optimizer makes the start of the first steps' gradients, 6 to 16 of them, in which nothing
   else is learnt. That is much of a short run.
5. **Rates.** Each contender searches its own on the ladder 1, 1.5, 2, 3, 5, 7 times powers of ten, by the loss on
   validation items with a seed of its own. The search goes downhill, first in strides of three, and ends when both
   neighbours are worse. The small version makes strides of two alone.
6. **Comparison.** At this rate come further seeds. A seed fixes the order of the data and the batches of the start, and
   all contenders share it. Differences are paired by seed, with 95 % intervals by Student's t. **Bold** leaves out 0.

How to run it, each in one command, offline:

```
python -m benchmarks.text --smoke                      # the small version, on one core
python -m benchmarks.text --prepare                    # the pack of text, build/text/full.xz
python -m benchmarks.text --device cuda --minutes 8    # on a GPU; without a pack it makes one of what is there
```

"""


def make_page(results: Path = RESULTS) -> str:
    """The page's text, of the results that are there."""
    found = {
        name: json.loads((results / file).read_text()) for name, file in FILES.items() if (results / file).exists()
    }
    parts = [INTRODUCTION, "" if "full" in found else NOT_RUN, HOW]
    parts += [_section(name, result) for name, result in found.items()]
    if found:
        parts.append(_texts(next(iter(found.values()))))
    return "".join(parts).rstrip("\n") + "\n"


def write() -> None:
    """The page and its pictures."""
    for name, file in FILES.items():
        if (RESULTS / file).exists():
            result = json.loads((RESULTS / file).read_text())
            for task in tasks_of(result):
                _draw(summaries(result, task), PAGE.parents[1] / "images" / f"text-{name}-{task}.png")
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"wrote {PAGE}")


def tasks_of(result: dict[str, Any]) -> list[str]:
    """Those that have runs to compare."""
    return [task for task in TASKS if summaries(result, task)]


def summaries(result: dict[str, Any], task: str) -> list[Summary]:
    """The contenders of a task."""
    size = _size(result)
    return summarize(result["rows"], task, size["choice_seeds"], size["strides"][-1])


def _size(result: dict[str, Any]) -> dict[str, Any]:
    size: dict[str, Any] = result["pretraining"]["made_of"]["size"]
    return size


def _section(name: str, result: dict[str, Any]) -> str:
    record, size, machine = result["pretraining"], _size(result), result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    where = machine.get("gpu") if result["device"] == "cuda" else f"{machine['cpu']}, {machine['threads']} thread"
    text = (
        f"## {TITLES[name]}\n\n"
        f"`benchmarks/results/{FILES[name]}`, made on {where}, with {versions}. The model has "
        f"{record['parameters'] / 1e6:.1f}M parameters in {size['layers']} layers of width {size['hidden']}, and a "
        f"vocabulary of {size['vocabulary']}. It was pretrained for {record['steps']} steps, on "
        f"{record['tokens'] / 1e6:.1f}M tokens, in {record['seconds']:.0f} s. On held-out Python its loss is "
        f"{record['held_out_loss']:.2f} per token.\n\n"
    )
    return text + "".join(_task(name, result, task) for task in tasks_of(result))


def _task(name: str, result: dict[str, Any], task: str) -> str:
    found, size, before = summaries(result, task), _size(result), result["before"][task]
    reference = next((s for s in found if s.name == REFERENCE), None)
    header = [
        "",
        "rate",
        "seeds",
        "held-out loss",
        f"over {REFERENCE}",
        "token accuracy, %",
        "seconds: start, training",
    ]
    lines = [["before any adaptation", "", "", f"{before['test_loss']:.3f}", "", f"{100 * before['score']:.1f}", ""]]
    for s in found:
        difference = None if reference in (None, s) else paired(s.rows, reference.rows, "test_loss")
        lines.append(
            [
                s.name,
                f"{s.rate:g}{'' if s.settled else ' (not settled)'}",
                str(len(s.rows)),
                with_interval(interval([row["test_loss"] for row in s.rows]), 1, 3),
                "" if difference is None else signed(difference, 1, 3),
                with_interval(interval([row["score"] for row in s.rows]), 100),
                f"{s.seconds[0]:.1f} + {s.seconds[1]:.1f}",
            ]
        )
    unit = "wall seconds" if result["device"] == "cuda" else "processor seconds"
    return (
        f"### Adaptation {TASKS[task]}\n\n"
        f"`python -m benchmarks.text{' --smoke' if name == 'smoke' else ' --device cuda'} --tasks {task}`: "
        f"{size['adapt_steps']} steps of {size['adapt_batch']} items, rank {size['rank']}. Times are {unit} of runs "
        f"that had the device for themselves. Less is better, in the loss and in its difference to {REFERENCE}'s.\n\n"
        + table(header, lines)
        + f"\n![Loss against steps and seconds](../images/text-{name}-{task}.png)\n\n"
        + _sweeps(result, task, found)
    )


def _sweeps(result: dict[str, Any], task: str, found: Sequence[Summary]) -> str:
    of_task = [row for row in result["rows"] if row["task"] == task]
    losses = {
        s.name: validation([row for row in of_task if row["contender"] == s.name], _size(result)["choice_seeds"])
        for s in found
    }
    return (
        "<details><summary>The searches: validation loss by learning rate</summary>\n\n"
        + sweeps(losses, {s.name: s.rate for s in found})
        + "\n</details>\n\n"
    )


def _texts(result: dict[str, Any]) -> str:
    """What the pack is made of, by licence and by package."""
    corpus = result["corpus"]
    packages: dict[str, set[str]] = {}
    files: Counter[str] = Counter()
    sizes: dict[str, Counter[str]] = {part: Counter() for part in ("pretraining", *TASKS)}
    for row in corpus["manifest"]:
        packages.setdefault(row["licence"], set()).add(f"{row['package']} {row['version']}")
        files[row["licence"]] += row["files"]
        sizes[row["part"].partition("/")[0]][row["licence"]] += row["bytes"]
    lines = [
        [
            licence,
            str(len(packages[licence])),
            str(files[licence]),
            *(f"{of_part[licence] / 1000:.0f}" for of_part in sizes.values()),
        ]
        for licence in sorted(packages, key=lambda licence: (-len(packages[licence]), licence))
    ]
    named = "\n".join(f"* {licence}: {', '.join(sorted(names))}" for licence, names in sorted(packages.items()))
    return (
        "## The text\n\n"
        f"The pack of these runs is {corpus['pack_bytes'] / 2**20:.1f} MiB, its digest `{corpus['digest']}`. It is no "
        "part of the repository.\nFiles are put into parts by their names alone, and no text is in two of them. Tests, "
        "vendored and generated files are\nleft out. Of the packages of *summaries* the functions with a summary are "
        "taken. Sizes are kB of files; *python* is the\nstandard library.\n\n"
        + table(["licence, by the metadata", "packages", "files", *sizes], lines)
        + f"\n<details><summary>The packages</summary>\n\n{named}\n\n</details>\n"
    )


def _draw(found: Sequence[Summary], path: Path) -> None:
    """Training loss against steps, and against seconds with the start's."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, s in enumerate(found):
        mean = np.mean([row["losses"] for row in s.rows], axis=0)  # (steps / THINNED)
        steps = THINNED * np.arange(1, len(mean) + 1)
        style: dict[str, Any] = {"color": f"C{number}", "lw": 2 if s.name.startswith("LoRA-One") else 1.2}
        left.plot(steps, mean, label=f"{s.name} ({s.rate:g})", **style)
        right.plot(s.seconds[0] + s.seconds[1] * steps / steps[-1], mean, **style)
    left.set(xlabel="step", ylabel=f"training loss, mean of {THINNED} steps and all seeds")
    right.set(xlabel="seconds, the start included")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, title="at its own rate", title_fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
