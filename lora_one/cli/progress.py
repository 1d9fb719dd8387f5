"""The progress of a fine-tuning run, shown in a terminal."""

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID

from lora_one.finetune.job import Outcome
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.source import Source
from lora_one.report import Report

from .bars import bars
from .output import show
from .quiet import is_verbose, quiet
from .tables import report_table

SMOOTHING = 10  # the loss shown is the mean over this many steps


class Terminal:
    """The `lora_one.finetune.Progress` that prints to a terminal."""

    def __init__(self, console: Console, recipe: Recipe, verbose: bool = False):
        self._console = console
        self._quiet = quiet(console, verbose)
        self._recipe = recipe
        self._losses: list[float] = []
        self._steps = recipe.steps
        self._began = time.perf_counter()
        self._bars = bars(console, redirect=verbose or is_verbose())
        self._task: TaskID | None = None

    def __enter__(self) -> "Terminal":
        self._console.print(
            f"[bold]lora-one[/]  model {escape(self._recipe.model or 'embedded tiny Llama')}, "
            f"data {escape(_name(self._recipe.data) or 'embedded task: sort letters')}"
        )
        self._bars.__enter__()
        self._quiet.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._quiet.__exit__(kind, error, trace)
        self._bars.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """Show that a part of the job begins."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=None, note="")

    def part(self, done: int, total: int) -> None:
        """Show how much of the part is done."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def warn(self, text: str) -> None:
        """Show a warning: something could not be done as asked."""
        self._print(f"[yellow]warning:[/] {escape(text)}")

    def report(self, report: Report) -> None:
        """Show the result of the initialization."""
        show(self._console, report_table(report))
        self._print(escape(report.summary()))

    def training(self, steps: int) -> None:
        """Show that the training begins.

        Args:
            steps: number of training steps.
        """
        self._steps = steps
        self.say("Training")

    def step(self, step: int, loss: float) -> None:
        """Show the loss of a training step that is done."""
        self._losses.append(loss)
        recent = self._losses[-SMOOTHING:]
        mean = sum(recent) / len(recent)
        if self._task is not None:
            self._bars.update(self._task, completed=step, total=self._steps, note=f"loss {mean:.3f}")
        if step == 1 or step % max(1, self._steps // 10) == 0:
            self._print(f"  step {step:>5}  loss {mean:.4f}")

    def validation(self, when: str, loss: float) -> None:
        """Show the mean loss on held-out data.

        Args:
            when: "before" or "after" the training, or for instance "at step 20".
        """
        if when.startswith("at step"):
            self._print(f"  step {when.split()[-1]:>5}  held-out loss {loss:.4f}")
        else:
            self._print(f"Validation loss {when} training: [bold]{loss:.4f}[/]")

    def score(self, when: str, exact_match: float, count: int) -> None:
        """Show the share of test items that were answered correctly."""
        self._print(f"Exact match {when} training: [bold]{exact_match:.1%}[/] of {count} held-out items")

    def benchmark(self, task: str, metric: str, value: float) -> None:
        """Show the result of a benchmark."""
        self._print(f"{escape(task)}  {escape(metric)}  [bold]{value:.4f}[/]")

    def finish(self, outcome: Outcome) -> None:
        """Print the last lines: the results, and what to do next."""
        seconds = time.perf_counter() - self._began
        out = escape(str(outcome.out))
        if outcome.resumed:
            self._print(f"Resumed after step {outcome.resumed}")
        if outcome.before is not None and outcome.after is not None:
            self._print(
                f"[bold green]Exact match {outcome.before:.1%} -> {outcome.after:.1%}[/] in {seconds:.0f} s, all told"
            )
        on_mlx, config = self._recipe.backend == "mlx", self._recipe.config
        readers = ["mlx-lm"] * (on_mlx and not config.modules_to_save) + ["PEFT"]
        readers += ["vLLM"] * (not config.modules_to_save and not config.dora)  # which it refuses
        self._print(f"Adapter: [bold]{out}[/] (opens in {' and '.join(readers)})")
        self._print("Next:")
        self._print(f"  lora-one inspect {out}")
        if on_mlx:
            self._print(f"  mlx_lm.generate --model DIR --adapter-path {out} --prompt TEXT")
        self._print(f'  python: model = peft.PeftModel.from_pretrained(base_model, "{out}")')
        if self._recipe.model is None:
            self._print("  lora-one finetune --model DIR --data FILE.jsonl   # your own")

    def _print(self, text: str) -> None:
        """Print a line without folding it: a folded path cannot be copied."""
        self._console.print(text, soft_wrap=True)


def _name(data: str | Source | None) -> str | None:
    return data.path if isinstance(data, Source) else data
