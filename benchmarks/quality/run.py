"""One fine-tuning run, the same loop for every contender."""

import time
from typing import Any

import torch

from benchmarks.energy import exact_gradients, factors_of, shares_of_best

from .contenders import Contender
from .task import Task

WARMUP = 10


def run(
    task: Task, contender: Contender, rank: int, rate: float, seed: int, measure_energy: bool = False
) -> dict[str, Any]:
    """Start, train, evaluate.

    A seed fixes the order of the data, the batches that the start reads, and what is random in the start; contenders
    with the same seed see the same data. Time is this process's processor time, so that a busy machine does not count.

    Args:
        measure_energy: add "energy", the share of the best energy of the init batches' gradient that the start holds
            in the worst layer.

    Returns:
        The row's measurements: plain data.
    """
    torch.manual_seed(seed)
    began = time.process_time()
    model, report = contender.start(task, rank, seed)
    initialised = time.process_time()
    energy = {"energy": _digits(_least_share(task, model, seed))} if measure_energy else {}
    resumed = time.process_time()
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
        contender.after_step(model, step)
        schedule.step()
        losses.append(float(loss.detach()))
    trained = time.process_time()
    return {
        "valid_loss": _digits(task.mean_loss(model, task.valid)),
        "test_loss": _digits(task.mean_loss(model, task.test)),
        "score": task.score(model, task.test),
        "losses": [_digits(loss) for loss in losses],
        "seconds_init": _digits(initialised - began),
        "seconds_train": _digits(trained - resumed),
        "gamma": None if report is None else report.gamma,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "passes": None if report is None else report.passes,
        **energy,
    }


def _least_share(task: Task, model: Any, seed: int) -> float:
    gradients = exact_gradients(task.model(), task.start_batches(seed), task.loss_fn, task.targets)
    return min(shares_of_best(gradients, {name: factors_of(model, name) for name in gradients}).values())


def _digits(x: float) -> float:
    """Four significant digits: what a measurement of one run is good for."""
    return float(f"{x:.4g}")
