"""The output of a command: lines and tables for people, or one JSON object on stdout for a program."""

import contextlib
import json
import math
import sys
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

JSON_HELP = "Print one JSON object on stdout, for programs; all else goes to stderr."
AsJson = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


class Output:
    """The output of one command.

    Attributes:
        console: where progress and warnings go: stdout, or stderr if stdout is for JSON.
        values: what to print as JSON at the end.
    """

    def __init__(self, as_json: bool):
        self._as_json = as_json
        self.console = open_console(stderr=as_json)
        self.values: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """Print a line of a result for people. It is not folded: a folded path cannot be copied."""
        if not self._as_json:
            self.console.print(text, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table of a result for people."""
        if not self._as_json:
            show(self.console, table)


def open_console(stderr: bool) -> Console:
    """Return a console that keeps to the width in COLUMNS, on a terminal without capabilities too."""
    console = Console(highlight=False, stderr=stderr)
    if console.is_dumb_terminal:
        console.height = 25  # for which rich takes 80 columns unless it is given a height
    return console


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Output]:
    """Yield a command's output; at the end of the block its `values` are printed, if the command was asked for JSON.

    Meanwhile whatever else writes to stdout, such as a library, writes to stderr. A block that raises prints no JSON.
    """
    out, stdout = Output(as_json), sys.stdout
    if not as_json:
        yield out
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield out
    print(json.dumps(_plain(out.values), indent=1, allow_nan=False), file=stdout)


def show(console: Console, table: Table) -> None:
    """Print a table as wide as it has to be.

    A terminal that is too narrow gets a paragraph a row instead. A pipe or a file gets the whole table.
    """
    natural = console.measure(table, options=console.options.update(width=10_000)).maximum
    if natural <= console.width:
        console.print(table)
    elif console.is_terminal:
        for line in _paragraphs(table, console.width):
            console.print(line, soft_wrap=True)
    else:
        width, console.width = console.width, natural
        console.print(table)
        console.width = width


def _paragraphs(table: Table, width: int) -> Iterator[Text]:
    """Yield the title, then a paragraph for each row: its first cell, and below it the others after their headers."""
    if table.title:
        yield Text.from_markup(str(table.title), style="italic")
    names = [str(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        first, *cells = (Text.from_markup(str(cell)).plain for cell in row)
        yield Text(first, style="bold")
        pairs = [f"{name} {cell}".replace(" ", "\u00a0") for name, cell in zip(names[1:], cells, strict=True) if cell]
        lines = textwrap.wrap(
            ", ".join(pairs), width, initial_indent="  ", subsequent_indent="  ", break_long_words=False
        )
        yield Text("\n".join(lines).replace("\u00a0", " "))
    if table.caption:
        yield Text.from_markup(str(table.caption), style="dim")


def _plain(value: Any) -> Any:
    """Return data with None for numbers that JSON does not have: infinities and "not a number"."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
