"""Fine-tuning quality by contender, task, rank, learning rate and seed.

    python -m benchmarks.quality                                    # the full plan; hours on one core
    python -m benchmarks.quality --tasks sort --stages sweep seeds
    python -m benchmarks.quality --tasks sort --stages sweep seeds --ranks 4 32 --only LoRA LoRA-One
    python -m benchmarks.quality --tasks sort --stages ablations --seeds 3
    python -m benchmarks.quality --result mine.json --tasks t5      # rows to a file of your own, and from there
    python -m benchmarks.quality --merge mine.json                  # to the others

Rows go to benchmarks/results/quality.json as they are made; runs that it has are not made again, so that the plan may
be stopped, gone on with and extended. `python -m benchmarks.page` makes docs/evidence/quality.md of it.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .contenders import ABLATIONS, CONTENDERS, MAIN
from .plan import ablate, repeat, sweep
from .results import RESULT, Key, Row, key_of, merge, read_rows, write_rows
from .run import run
from .tasks import TASKS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--stages", nargs="*", default=["sweep", "seeds"], choices=["sweep", "seeds", "ablations"])
    parser.add_argument("--ranks", nargs="*", type=int, default=[8])
    parser.add_argument("--only", nargs="*", default=list(MAIN), choices=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--rates", nargs="*", type=float, default=[], help="these alone, not each contender's grid")
    parser.add_argument("--ablate", nargs="*", default=list(ABLATIONS), choices=list(ABLATIONS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="take these files' rows; make no runs")
    return parser.parse_args()


def planned(options: argparse.Namespace, rows: list[Row], task: str) -> Iterator[Key]:
    """The keys of one task, each asked for when the rows before it are there."""
    for stage in options.stages:
        if stage == "ablations":
            yield from ablate(rows, task, options.ablate, options.seeds)
            continue
        for rank in options.ranks:
            if stage == "sweep":
                yield from sweep(rows, task, options.only, rank, options.rates)
            else:
                yield from repeat(rows, task, options.only, rank, options.seeds)


def main() -> None:
    """Make the runs that are asked for and not there yet."""
    options = arguments()
    rows = read_rows(options.result)
    if options.merge:
        for file in options.merge:
            if not file.is_file():
                raise FileNotFoundError(file)
            rows = merge(rows, read_rows(file))
        write_rows(rows, options.result)
        print(f"{len(rows)} runs in {options.result}")
        return
    machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    done = {key_of(row) for row in rows}
    for name in options.tasks:
        task = TASKS[name]()
        for key in planned(options, rows, name):
            if key in done:
                continue
            began = time.perf_counter()
            contender = (CONTENDERS if key.group == "main" else ABLATIONS[key.group])[key.contender]
            row = {
                **key._asdict(),
                **run(task, contender, key.rank, key.rate, key.seed, key.group == "passes"),
                **machine,
            }
            rows.append(row)
            done.add(key)
            write_rows(rows, options.result)
            said = {k: row[k] for k in ("valid_loss", "test_loss", "score", "seconds_init", "seconds_train")}
            print(*key, json.dumps(said), f"{time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
