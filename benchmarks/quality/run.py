"""One fine-tuning run, the same loop for every contender."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .contenders import Contender
from .task import Task
from .update import Factors, factors_by_layer, moved, update_rank

WARMUP = 10
EARLY = 10  # the step after which it is told how far A has gone


class Trained(NamedTuple):
    """A model after training, and what was seen on the way."""

    model: nn.Module
    report: Any  # lora_one.Report, or None
    losses: list[float]
    start: dict[str, Factors]  # the factors before the first step
    early: float | None  # mean over layers of |A - A0| / |A0| after EARLY steps
    seconds_init: float
    seconds_train: float


def train(
    task: Task,
    contender: Contender,
    rank: int,
    rate: float,
    seed: int,
    steps: int | None = None,
) -> Trained:
    """Start and train.

    A seed fixes the order of the data, the batches that the start reads, and what is random in the start; contenders
    with the same seed see the same data. Time is by the task's clock.

    Args:
        steps: stop after these; the schedule is that of the whole run all the same.
    """
    torch.manual_seed(seed)
    began = task.clock()
    model, report = contender.start(task, rank, seed)
    initialised = task.clock()
    start, early = factors_by_layer(model), None
    resumed = task.clock()
    optimizer = contender.optimizer(model, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (task.steps - step) / (task.steps - WARMUP))
    )
    losses = []
    model.train()
    for step, batch in enumerate(task.training_batches(seed), 1):
        optimizer.zero_grad()
        loss = task.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        contender.after_step(model, step, optimizer)
        schedule.step()
        losses.append(_digits(float(loss.detach())))
        if step == EARLY:
            early = moved(start, factors_by_layer(model))
        if step == steps:
            break
    trained = task.clock()
    return Trained(model, report, losses, start, early, _digits(initialised - began), _digits(trained - resumed))


def run(
    task: Task,
    contender: Contender,
    rank: int,
    rate: float,
    seed: int,
    on: Sequence[str] = ("valid", "test"),
) -> dict[str, Any]:
    """Start, train, evaluate.

    Args:
        on: the items to evaluate on, of "valid", "test" and "fresh". The latter two are told as "test_loss" and
            "score"; the first only chooses a rate.

    Returns:
        The row's measurements: plain data.
    """
    trained = train(task, contender, rank, rate, seed)
    model, report = trained.model, trained.report
    measured: dict[str, Any] = {"valid_loss": _digits(task.mean_loss(model, task.valid))} if "valid" in on else {}
    for name in ("test", "fresh"):
        if name in on:
            items = getattr(task, name)
            measured |= {"test_loss": _digits(task.mean_loss(model, items)), "score": task.score(model, items)}
    return {
        **measured,
        "losses": trained.losses,
        "moved": None if trained.early is None else _digits(trained.early),
        "update_rank": update_rank(trained.start, model, contender.moves_base),
        "seconds_init": trained.seconds_init,
        "seconds_train": trained.seconds_train,
        "gamma": None if report is None else report.gamma,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "passes": None if report is None else report.passes,
    }


def _digits(x: float) -> float:
    """Four significant digits: what a measurement of one run is good for."""
    return float(f"{x:.4g}")
