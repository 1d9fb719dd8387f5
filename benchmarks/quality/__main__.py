"""Fine-tuning quality by contender, task, rank, learning rate and seed, by the protocol of protocol.py.

    python -m benchmarks.quality                                   # all cells that are missing; many hours on one core
    python -m benchmarks.quality --tasks sort --ranks 32 --only LoRA           # one cell
    python -m benchmarks.quality --tasks sort --ranks 32 --only LoRA --again   # from the beginning
    python -m benchmarks.quality --stages ablations --tasks sort
    python -m benchmarks.quality --stale                           # which cells today's code no longer reproduces
    python -m benchmarks.quality --stale --forget                  # and take their runs out

A cell is a task, a rank and a contender. Rows go to benchmarks/results/quality.json as they are made, and runs that it
has are not made again: the plan may be stopped, gone on with and extended. Several of these processes may run at once:
each takes cells that no other one is at. `python -m benchmarks.page` makes docs/evidence/quality.md of the rows.
"""

import argparse
import fcntl
import json
import os
import platform
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import protocol, stale
from .contenders import ABLATIONS, CONTENDERS
from .plan import CELLS, ablate
from .results import ABLATIONS as ABLATED
from .results import RESULT, Key, Row, add_row, key_of, read_rows, write_rows
from .run import run
from .task import Task
from .tasks import TASKS, opened

KEPT_OF_CHOICE = 10  # losses of a run that only chooses a rate: enough to see whether today's code still makes it


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS))
    parser.add_argument("--ranks", nargs="*", type=int)
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--stages", nargs="*", default=["choice", "test"], choices=["choice", "test", "ablations"])
    parser.add_argument("--ablate", nargs="*", default=list(ABLATIONS), choices=list(ABLATIONS))
    parser.add_argument("--seeds", type=int, default=5, help="of ablations")
    parser.add_argument("--stale", action="store_true", help="make three steps of each cell and compare")
    parser.add_argument("--forget", action="store_true", help="take the runs of stale cells out of the file")
    parser.add_argument("--again", action="store_true", help="take the runs of these cells out and make them anew")
    parser.add_argument("--result", type=Path, default=RESULT)
    return parser.parse_args()


def cells(options: argparse.Namespace) -> list[tuple[str, int, str]]:
    """What is asked for: the plan's cells, or every combination of what is named."""
    if options.tasks and options.ranks and options.only:
        return [(task, rank, name) for task in options.tasks for rank in options.ranks for name in options.only]
    return [
        (task, rank, name)
        for task, rank, name in dict.fromkeys(CELLS)
        if task in (options.tasks or TASKS) and name in (options.only or CONTENDERS)
        if not options.ranks or rank in options.ranks
    ]


def planned(options: argparse.Namespace, rows: list[Row], cell: tuple[str, int, str]) -> Iterator[Key]:
    """The keys of a cell, each asked for when the rows before it are there."""
    task, rank, name = cell
    if "choice" in options.stages:
        yield from protocol.choice(rows, task, name, rank, CONTENDERS[name].rate)
    if "test" in options.stages:
        yield from protocol.test(rows, task, name, rank)


def without(named: list[tuple[str, int, str]], result: Path) -> None:
    """Take the runs of these cells out of the file."""
    rows = read_rows(result)
    write_rows((row for row in rows if (row["task"], row["rank"], row["contender"]) not in named), result)


@contextmanager
def taken(result: Path, cell: tuple[str, int, str]) -> Iterator[bool]:
    """Whether this process has the cell for itself, until the block ends."""
    name = zlib.crc32(f"{result.resolve()}/{cell}".encode())
    with (Path(tempfile.gettempdir()) / f"lora-one-cell-{name:08x}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def make(task: Task, key: Key, result: Path) -> list[Row]:
    """Make a run and write it down. Returns all rows."""
    began = time.perf_counter()
    contender = (CONTENDERS if key.group == "main" else ABLATIONS[key.group])[key.contender]
    on = "fresh" if key.group != "main" or key.seed in protocol.TEST_SEEDS else "valid"
    measured = run(task, contender, key.rank, key.rate, key.seed, [on])
    if "valid_loss" in measured:
        measured["losses"] = measured["losses"][:KEPT_OF_CHOICE]
    made_with = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    rows = add_row({**key._asdict(), **measured, "data": task.digest(), **made_with}, result)
    said = {name: measured.get(name) for name in ("valid_loss", "test_loss", "score", "seconds_train")}
    print(*key, json.dumps(said), f"{time.perf_counter() - began:.1f} s", flush=True)
    return rows


def main() -> None:
    """Make the runs that are asked for and not there yet; or tell which are stale."""
    options = arguments()
    if options.stale:
        stale.tell(cells(options), options.result, options.forget)
        return
    if options.again:
        without(cells(options), options.result)
    if "ablations" in options.stages:
        make_ablations(options)
    for cell in cells(options):
        with taken(options.result, cell) as mine:
            if mine:
                make_cell(options, cell)


def make_ablations(options: argparse.Namespace) -> None:
    """The runs of the ablations that are not there yet."""
    rows, done = read_rows(options.result), set(map(key_of, read_rows(ABLATED)))
    for name in options.tasks or TASKS:
        for key in ablate(rows, name, options.ablate, options.seeds):
            if key not in done:
                make(opened(name), key, ABLATED)


def make_cell(options: argparse.Namespace, cell: tuple[str, int, str]) -> None:
    """The runs of a cell that are not there yet."""
    rows = read_rows(options.result)
    for key in planned(options, rows, cell):
        if key not in set(map(key_of, rows)):
            rows[:] = make(opened(key.task), key, options.result)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
