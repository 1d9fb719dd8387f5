"""Which runs today's code would no longer make: computed, not remembered.

A run is fixed by its seed, so its first losses tell whether it would come out again. One run of each cell is begun anew
and its first losses, the data and the passes of the start are compared with what is written down.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from .contenders import CONTENDERS
from .results import Row, read_rows, select, write_rows
from .run import train
from .task import Task
from .tasks import opened

STEPS = 3  # the first step is at a tenth of the rate, the second knows of the first
TOLERANCE = 2e-3  # of a loss: another processor rounds differently, another start is further off


def reason(row: Row, task: Task) -> str | None:
    """Why a row is stale; None if it is not."""
    digest = task.digest()
    if row.get("data", digest) != digest:
        return "other data"
    trained = train(task, CONTENDERS[row["contender"]], row["rank"], row["rate"], row["seed"], STEPS)
    passes = None if trained.report is None else trained.report.passes
    if row.get("passes", passes) != passes:
        return f"a start in {row['passes']} passes, {passes} today"
    for step, (before, now) in enumerate(zip(row["losses"][:STEPS], trained.losses, strict=True), 1):
        if not math.isclose(before, now, rel_tol=TOLERANCE):
            return f"loss {before} at step {step}, {now} today"
    return None


def tell(cells: Sequence[tuple[str, int, str]], result: Path, forget: bool) -> None:
    """Print the stale cells, and take their runs out of the file if that is asked for."""
    rows = read_rows(result)
    for name, rank, contender in cells:
        mine = select(rows, task=name, group="main", contender=contender, rank=rank)
        for version in sorted({row.get("data", "") for row in mine}):
            of_version = [row for row in mine if row.get("data", "") == version]
            why = reason(max(of_version, key=lambda row: row["seed"]), opened(name))
            print(
                name, rank, contender, f"stale: {why}" if why else "as today", f"({len(of_version)} runs)", flush=True
            )
            if why and forget:
                rows = [row for row in rows if row not in of_version]
    if forget:
        write_rows(rows, result)
