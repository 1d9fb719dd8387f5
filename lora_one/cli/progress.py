"""What a fine-tuning run looks like in a terminal."""

import itertools
import time
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lora_one.checkpoint.inspection import Inspection
from lora_one.conformance.report import Conformance, cell
from lora_one.finetune.datasets import Source
from lora_one.finetune.job import Outcome
from lora_one.finetune.recipe import Recipe
from lora_one.report import Report

from .quiet import is_verbose, quiet

_STYLE: Any = {"box": SIMPLE_HEAD, "padding": (0, 1), "pad_edge": False, "collapse_padding": True}
SMOOTHING = 10  # steps that the loss shown is a mean of


class Terminal:
    """Tells a person how far the job is: see `lora_one.finetune.job.Progress`."""

    def __init__(self, console: Console, recipe: Recipe, verbose: bool = False):
        self._console = console
        self._quiet = quiet(console, verbose)
        self._recipe = recipe
        self._losses: list[float] = []
        self._steps = recipe.steps
        self._began = time.perf_counter()
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=verbose or is_verbose(),  # what others print goes above the bars then, and else nowhere
            redirect_stderr=verbose or is_verbose(),
        )
        self._task: Any = None

    def __enter__(self) -> "Terminal":
        self._console.print(
            f"[bold]lora-one[/]  model {escape(self._recipe.model or 'embedded tiny Llama')}, "
            f"data {escape(_name(self._recipe.data) or 'embedded task: sort letters')}"
        )
        self._bars.__enter__()
        self._quiet.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._quiet.__exit__(*exception)
        self._bars.__exit__(*exception)

    def say(self, text: str) -> None:
        """A step of the job begins."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=self._steps if text == "Training" else None, note="")

    def warn(self, text: str) -> None:
        """Something went otherwise than asked."""
        self._bars.print(f"[yellow]warning:[/] {escape(text)}")

    def report(self, report: Report) -> None:
        """The initialisation is done."""
        self._bars.print(report_table(report))
        self._bars.print(escape(report.summary()))

    def training(self, steps: int) -> None:
        """The training begins."""
        self._steps = steps
        self.say("Training")

    def step(self, step: int, loss: float) -> None:
        """A training step is done."""
        self._losses.append(loss)
        recent = self._losses[-SMOOTHING:]
        mean = sum(recent) / len(recent)
        self._bars.update(self._task, completed=step, note=f"loss {mean:.3f}")
        if step == 1 or step % max(1, self._steps // 10) == 0:
            self._bars.print(f"  step {step:>5}  loss {mean:.4f}")

    def validation(self, when: str, loss: float) -> None:
        """The mean loss on held-out data."""
        self._bars.print(f"Validation loss {when} training: [bold]{loss:.4f}[/]")

    def score(self, when: str, exact_match: float, count: int) -> None:
        """The test items were answered."""
        self._bars.print(f"Exact match {when} training: [bold]{exact_match:.1%}[/] of {count} held-out items")

    def benchmark(self, task: str, metric: str, value: float) -> None:
        """A benchmark was run."""
        self._bars.print(f"{escape(task)}  {escape(metric)}  [bold]{value:.4f}[/]")

    def finish(self, outcome: Outcome) -> None:
        """The last lines: what came out, and what to do next."""
        seconds = time.perf_counter() - self._began
        out = escape(str(outcome.out))
        if outcome.resumed:
            self._say(f"Resumed after step {outcome.resumed}")
        if outcome.before is not None and outcome.after is not None:
            self._say(
                f"[bold green]Exact match {outcome.before:.1%} -> {outcome.after:.1%}[/] in {seconds:.0f} s, all told"
            )
        on_mlx = self._recipe.backend == "mlx"
        self._say(f"Adapter: [bold]{out}[/] (opens in {'mlx-lm and ' if on_mlx else ''}PEFT and vLLM)")
        self._say("Next:")
        self._say(f"  lora-one inspect {out}")
        if on_mlx:
            self._say(f"  mlx_lm.generate --model DIR --adapter-path {out} --prompt TEXT")
        self._say(f'  python: model = peft.PeftModel.from_pretrained(base_model, "{out}")')
        if self._recipe.model is None:
            self._say("  lora-one finetune --model DIR --data FILE.jsonl   # your own")

    def _say(self, text: str) -> None:
        """A line as it is: a path that is folded at the edge cannot be copied."""
        self._console.print(text, soft_wrap=True)


def _name(data: str | Source | None) -> str | None:
    return data.path if isinstance(data, Source) else data


def report_table(report: Report) -> Table:
    """The layers of an initialisation."""
    prefix = _common_prefix([layer.name for layer in report.layers])
    table = Table(title=f"LoRA-One start, layers of {prefix or 'the model'}", title_justify="left", **_STYLE)
    for name, justify in (
        ("layer", "left"),
        ("shape", "right"),
        ("r", "right"),
        ("|G|", "right"),
        ("S_r/S_1", "right"),
        ("energy", "right"),
        ("of best", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for layer in report.layers:
        shape = f"{layer.out_features} x {layer.in_features}"
        if layer.start == "plain":
            table.add_row(escape(layer.name[len(prefix) :]), shape, str(layer.rank), "0", "", "plain LoRA", "")
            continue
        table.add_row(
            escape(layer.name[len(prefix) :]),
            shape,
            str(layer.rank),
            f"{layer.gradient_norm:.2e}",
            f"{layer.singular_values[-1] / layer.singular_values[0]:.3f}",
            f"{layer.energy:.3f}",
            f"{layer.share_of_best:.3f}",
        )
    return table


def inspection_table(found: Inspection) -> Table:
    """The layers of an adapter on disk."""
    prefix = _common_prefix([layer.name for layer in found.layers])
    table = Table(
        title=f"{escape(str(found.path))}, layers of {prefix or 'the model'}",
        title_justify="left",
        caption="stable: stable rank of sBA; energy: of the gradient at the start; grown: |sBA| over its start",
        caption_justify="left",
        **_STYLE,
    )
    for name in ("layer", "shape", "r", "|sBA|", "S_r/S_1", "stable", "energy", "grown"):
        table.add_column(name, justify="left" if name == "layer" else "right", overflow="fold")
    for layer in found.layers:
        start = layer.start
        table.add_row(
            escape(layer.name[len(prefix) :]),
            f"{layer.out_features} x {layer.in_features}",
            str(layer.rank),
            f"{layer.norm:.3g}",
            f"{layer.singular_values[-1] / (layer.singular_values[0] or 1.0):.3f}",
            f"{layer.stable_rank:.2f}",
            "" if start is None else f"{start.energy:.3f}",
            "" if layer.growth is None else f"{layer.growth:.1f}x",
        )
    return table


def _common_prefix(names: list[str]) -> str:
    """What all names begin with, up to a dot: in a table it would only take room."""
    parts = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return "".join(f"{level[0]}." for level in shared)


def conformance_tables(found: Conformance) -> list[Table]:
    """The results of the conformance suite, a table for each dtype."""
    tables = []
    for dtype in dict.fromkeys(result.dtype for result in found.results):
        backends, rows = found.rows(dtype)
        table = Table(title=f"{dtype}: error / allowed", title_justify="left", **_STYLE)
        table.add_column("check")
        for backend in backends:
            table.add_column(backend, justify="right", no_wrap=True)
        for name, results in rows:
            texts = [cell(r) if r is None or r.passed else f"[bold red]{escape(cell(r))}[/]" for r in results]
            table.add_row(name, *texts)
        tables.append(table)
    return tables
