"""Progress bars with the time that is left. They are drawn on terminals only: a pipe or a file gets none of them."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

NARROW = 70  # columns; below that there is no room for the bar beside its numbers
Advance = Callable[[int, int], None]  # told how much is done, and of how much


class _Bars(Progress):
    """Bars that neither start nor stop where nobody sees them; `Progress` leaves an empty line in a pipe."""

    def start(self) -> None:
        if self.console.is_interactive:
            super().start()

    def stop(self) -> None:
        if self.console.is_interactive:
            super().stop()


class _Words(ProgressColumn):
    """What is being done; cut short where there is no room for it."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _Count(ProgressColumn):
    """The count, as 12/60; nothing where the total is unknown."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}", style="progress.download")


class _Time(ProgressColumn):
    """The time that is left, or the time so far where that is unknown."""

    def render(self, task: Task) -> Text:
        elapsed, left = task.elapsed or 0.0, task.time_remaining
        if left is None and task.total and task.completed:  # the first part that is done
            left = elapsed / task.completed * (task.total - task.completed)
        if left is None:
            return Text(f"{clock(elapsed)} so far", style="progress.elapsed")
        return Text(f"{clock(left)} left", style="progress.remaining")


def clock(seconds: float) -> str:
    """Return a time as 0:59 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bars(console: Console, redirect: bool = False) -> Progress:
    """Return bars below the other lines of a console. They vanish when they are done.

    Args:
        redirect: print what others write to stdout and stderr above the bars.
    """
    bar = () if console.width < NARROW else (BarColumn(bar_width=20),)
    return _Bars(
        SpinnerColumn(),
        _Words(),
        *bar,
        _Count(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}"),
        _Time(table_column=Column(no_wrap=True)),
        console=console,
        transient=True,
        redirect_stdout=redirect,
        redirect_stderr=redirect,
    )


@contextlib.contextmanager
def bar(console: Console, text: str) -> Iterator[Advance]:
    """Show one bar while the block runs, and yield the function that moves it."""
    with bars(console) as progress:
        task = progress.add_task(text, total=None, note="")
        yield lambda done, total: progress.update(task, completed=done, total=total)
