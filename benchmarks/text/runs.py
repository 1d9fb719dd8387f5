"""The runs of adaptation: the search for each contender's rate, and the runs that are compared; in any process."""

import functools
import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.preconditioner.sweep import OutOfTime, climb
from benchmarks.quality.protocol import LADDER
from benchmarks.quality.results import Key, Row, key_of
from benchmarks.quality.run import run, train
from benchmarks.quality.task import Task

from . import corpus, pretraining
from .adaptation import WHO, make_task
from .sizes import SIZES, THINNED

GROUP = "main"


class Setup(NamedTuple):
    """What another process needs to make the same runs."""

    size: str
    pack: Path
    model: Path
    task: str
    device: str


def prepare_device(device: str) -> None:
    """TF32 for products on a GPU, for all contenders. LoRA-One's own arithmetic stays in float32 all the same."""
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.zeros(1, device="cuda")


@functools.lru_cache(maxsize=1)
def opened(setup: Setup) -> Task:
    """The task, once per process."""
    size = SIZES[setup.size]
    prepare_device(setup.device)
    model, _ = pretraining.load(size, setup.model)
    return make_task(setup.task, corpus.read(setup.pack), model, size, setup.device)


def choose(setup: Setup, name: str, known: Sequence[Row], deadline: float) -> list[Row]:
    """The runs of a contender's search for its rate, which ends early at the deadline, of `time.time()`.

    Strides on the ladder of rates grow finer; at each, the search goes downhill until both neighbours are worse.
    """
    size, rows = SIZES[setup.size], {key_of(row): row for row in known}

    def loss_at(index: int) -> float:
        if not 0 <= index < len(LADDER):
            return math.inf
        keys = [Key(setup.task, GROUP, name, size.rank, LADDER[index], seed) for seed in size.choice_seeds]
        for key in keys:
            if key not in rows:
                if time.time() > deadline:
                    raise OutOfTime
                rows[key] = {**key._asdict(), "valid_loss": _validation_loss(setup, key)}
                print(name, key.rate, key.seed, rows[key]["valid_loss"], flush=True)
        mean = sum(rows[key]["valid_loss"] for key in keys) / len(keys)
        return mean if math.isfinite(mean) else math.inf

    place = LADDER.index(WHO[name].rate)
    try:
        for stride in size.strides:
            place = _downhill(loss_at, place, stride)
    except OutOfTime:
        print(name, "the search for its rate is out of time", flush=True)
    except RuntimeError:  # one who fails on a device takes nobody along
        traceback.print_exc()
    return list(rows.values())


def _downhill(loss_at: Callable[[int], float], place: int, stride: int) -> int:
    """The place whose neighbours, a stride away, are worse."""
    return place + stride * climb(lambda k: loss_at(place + stride * k), 0)


def _validation_loss(setup: Setup, key: Key) -> float:
    """nan if the run diverged so far that its factors have no singular values."""
    try:
        measured = run(opened(setup), WHO[key.contender], key.rank, key.rate, key.seed, ["valid"])
    except torch.linalg.LinAlgError:
        return math.nan
    return float(measured["valid_loss"])


def compare(setup: Setup, name: str, rate: float, seed: int, alone: bool, deadline: float = math.inf) -> Row | None:
    """A run that is compared; None after the deadline, or if it failed.

    Args:
        alone: nothing else is at the device, so that its seconds may be told.
    """
    if time.time() > deadline:
        return None
    size = SIZES[setup.size]
    try:
        measured = run(opened(setup), WHO[name], size.rank, rate, seed, ["test"])
    except RuntimeError:
        traceback.print_exc()
        return None
    losses = measured["losses"]
    means = [sum(losses[i : i + THINNED]) / len(losses[i : i + THINNED]) for i in range(0, len(losses), THINNED)]
    kept = {key: measured[key] for key in ("test_loss", "score", "parameters")}
    if alone:
        kept |= {key: measured[key] for key in ("seconds_init", "seconds_train")}
    print(name, rate, seed, kept, flush=True)
    key = Key(setup.task, GROUP, name, size.rank, rate, seed)
    return {**key._asdict(), **kept, "losses": [float(f"{mean:.4g}") for mean in means]}


def warm_up(setup: Setup, names: Iterable[str]) -> None:
    """Two steps of each, so that what a device loads at first is no part of anybody's time."""
    task, rank = opened(setup), SIZES[setup.size].rank
    for name in names:
        train(task, WHO[name], rank, WHO[name].rate, 0, steps=2)


def before(setup: Setup) -> dict[str, float]:
    """What the pretrained model does on the held-out items without any adaptation."""
    task = opened(setup)
    loss = task.mean_loss(task.base, task.test)
    return {"test_loss": float(f"{loss:.4g}"), "score": task.score(task.base, task.test)}
