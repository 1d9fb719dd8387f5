"""Adaptation of a model that is no toy, from nothing to the table, offline and in one command.

    python -m benchmarks.text --smoke                        # the small version, on one core in eight minutes
    python -m benchmarks.text --prepare                      # the pack of text alone, which may travel
    python -m benchmarks.text --device cuda --minutes 8      # a decoder of 46M parameters, on a GPU

A decoder is pretrained on Python and documentation that is installed here, then adapted to C++ (or to writing summaries
of functions) by each contender at its own best rate. `--minutes` are shared out: a quarter is for pretraining, then
each task gets the same; half of that finds the rates, and the seeds follow, one seed of every contender before the
next, so that whenever it ends, all that are compared have the same seeds. A pack or a pretrained model that is there is
used again, and so are the runs of the result that were made with them: a second command goes on.
`python -m benchmarks.page` makes docs/evidence/text.md of the results.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks import harness
from benchmarks.quality.results import select

from . import corpus, pretraining, runs
from .adaptation import WHO
from .sizes import SIZES, TASKS, Size
from .sources import sources
from .summary import chosen_rate
from .tokens import stream

BUILD = harness.ROOT / "build" / "text"
RESULTS = {"full": harness.RESULTS / "text.json", "smoke": harness.RESULTS / "text_smoke.json"}
PRETRAINING_SHARE, CHOICE_SHARE = 0.25, 0.5  # of the time: of all of it, and of a task's
SPARE_SECONDS = 30  # of the minutes: for the imports, and for what is still running at the end


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.text", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="the small version")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything but the making of a pack")
    parser.add_argument("--tasks", nargs="*", default=["cpp"], choices=list(TASKS))
    parser.add_argument("--pack", type=Path, help="of text; made of what is installed if it is not there")
    parser.add_argument("--model", type=Path, help="pretrained; made if it is not there or of another pack")
    parser.add_argument("--prepare", action="store_true", help="make the pack and stop")
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    name = "smoke" if options.smoke else "full"
    options.pack = options.pack or BUILD / f"{name}.xz"
    options.model = options.model or BUILD / f"{name}.pt"
    options.result = options.result or RESULTS[name]
    options.size = SIZES[name]
    return options


def packed(path: Path, size: Size) -> corpus.Corpus:
    """The pack's corpus; the pack is made if it is not there."""
    if not path.exists():
        began = time.perf_counter()
        corpus.write(corpus.collect(size, sources()), path)
        print(f"packed {path.stat().st_size / 2**20:.1f} MiB in {time.perf_counter() - began:.0f} s", flush=True)
    return corpus.read(path)


def pretrained(path: Path, text: corpus.Corpus, size: Size, device: str, seconds: float) -> dict[str, Any]:
    """The record of the pretrained model in the file; the model is made if it is not there."""
    made_of = {"corpus": text.digest(), "size": json.loads(json.dumps(dataclasses.asdict(size)))}  # as it is read again
    if path.exists():
        record = pretraining.load(size, path)[1]
        if record["made_of"] == made_of:
            return record
    runs.prepare_device(device)
    torch.manual_seed(0)
    model = pretraining.build(size).to(device)
    tokenizer = Tokenizer.from_str(text.tokenizer)
    tokens = stream(tokenizer, text.parts["pretraining"])
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens of text", flush=True)
    record = {"made_of": made_of, "parameters": model.num_parameters(), "corpus_tokens": len(tokens)}
    record |= pretraining.pretrain(model, tokens, size, device, seconds)
    held_out = stream(tokenizer, text.parts["pretraining/valid"])
    record["held_out_loss"] = pretraining.held_out_loss(model, held_out, size, device)
    pretraining.save(model, record, path)
    return record


class Workers:
    """Calls of functions in other processes, in turn if there are none."""

    def __init__(self, jobs: int):
        self._pool = ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else None

    def start(self, device: str) -> None:
        """Let them import everything while the model is pretrained."""
        if self._pool is not None:
            self._pool.submit(runs.prepare_device, device)

    def map(self, function: Any, calls: Any) -> Any:
        """The results in the order of the calls, as they come."""
        if self._pool is None:
            return itertools.starmap(function, calls)
        return (future.result() for future in [self._pool.submit(function, *call) for call in calls])

    def stop(self) -> None:
        """End them."""
        if self._pool is not None:
            self._pool.shutdown()


def adapt(setup: runs.Setup, rows: list[runs.Row], workers: Workers, end: float, save: Any) -> None:
    """All runs of a task, added to the rows.

    Args:
        end: when no run is to be begun any more, by `time.time()`.
    """
    size, deadline = SIZES[setup.size], time.time() + CHOICE_SHARE * (end - time.time())
    of_task = [row for row in select(rows, task=setup.task) if row["seed"] in size.choice_seeds]
    chosen = [select(of_task, contender=name) for name in WHO]
    searches = [(setup, name, known, deadline) for name, known in zip(WHO, chosen, strict=True)]
    for known, found in zip(chosen, workers.map(runs.choose, searches), strict=True):
        rows += found[len(known) :]
        save()
    mine = {name: select(rows, task=setup.task, contender=name) for name in WHO}
    rates = {name: rate for name in WHO if (rate := chosen_rate(mine[name], size.choice_seeds)) is not None}
    done = {(row["contender"], row["rate"], row["seed"]) for row in rows if row["task"] == setup.task}
    calls = [
        (setup, name, rates[name], seed, seed == size.test_seeds[0] or size.jobs == 1, end)
        for seed in size.test_seeds
        for name in rates
        if (name, rates[name], seed) not in done
    ]
    alone, together = ([call for call in calls if call[4] is wanted] for wanted in (True, False))
    if setup.device == "cuda" and alone:
        runs.warm_up(setup, rates)
    for row in itertools.starmap(runs.compare, alone):
        rows += [] if row is None else [row]
        save()
    for row in workers.map(runs.compare, together):
        rows += [] if row is None else [row]
        save()


def main() -> None:
    """The pack, the model, the runs, the result."""
    options = arguments()
    size = options.size
    text = packed(options.pack, size)
    if options.prepare:
        return
    began = time.time()
    end = began + 60 * options.minutes - SPARE_SECONDS
    workers = Workers(size.jobs)
    workers.start(options.device)
    # On a CPU the model is always the same: its steps are counted, not its seconds.
    seconds = PRETRAINING_SHARE * (end - began) if options.device == "cuda" else math.inf
    record = pretrained(options.model, text, size, options.device, seconds)
    result = json.loads(options.result.read_text()) if options.result.exists() else {}
    kept = result if result.get("pretraining") == record else {"rows": [], "before": {}}
    rows, before = kept["rows"], kept["before"]

    made = {
        "machine": harness.machine(),  # once: it asks the GPU's driver, which takes its time
        "versions": harness.versions("torch", "transformers", "peft", "tokenizers"),
        "device": options.device,
        "corpus": {"digest": text.digest(), "pack_bytes": options.pack.stat().st_size, "manifest": text.manifest},
        "pretraining": record,
    }

    def save() -> None:
        options.result.write_text(json.dumps({**made, "before": before, "rows": rows}, indent=1) + "\n")

    for number, task in enumerate(options.tasks):
        setup = runs.Setup(size.name, options.pack, options.model, task, options.device)
        before[task] = runs.before(setup)
        print(task, "before any adaptation", before[task], flush=True)
        share = (end - time.time()) / (len(options.tasks) - number)
        adapt(setup, rows, workers, time.time() + share, save)
    workers.stop()
    print(f"done in {(time.time() - began) / 60:.1f} minutes: {options.result}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
