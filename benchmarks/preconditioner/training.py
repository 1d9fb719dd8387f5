"""One training run of a task by a rule."""

import math
import time
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .optimizer import RuleOptimizer
from .rules import Rule
from .tasks import Task, make_task

WARMUP = 10
CLIP = 1.0  # of the raw gradients' norm: transformers' Trainer's default


class Job(NamedTuple):
    """How long a run is, and how much it sees; the regression tasks see all their data at each step."""

    steps: int
    batch_size: int


JOBS = {"screen": Job(60, 16), "full": Job(200, 32)}

_task = lru_cache(maxsize=1)(make_task)  # the start is made once for all rules and rates


def train(task: Task, rule: Rule, rate: float, steps: int) -> list[float]:
    """Train from the start, the rate linear after the warm-up: the losses, up to one that is not finite."""
    task.reset()
    task.model.train()
    optimizer = RuleOptimizer(task.pairs, rule)
    parameters = [parameter for pair in task.pairs for parameter in pair]
    losses: list[float] = []
    for index in range(steps):
        loss = task.loss(index)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step(rate * min(index / WARMUP, (steps - index) / (steps - WARMUP)))
    return losses


def run(job: str, name: str, rank: int, rule: Rule, rate: float, seed: int) -> dict[str, Any]:
    """Train and measure: a row of the results. A run that diverged has no loss."""
    steps, batch_size = JOBS[job]
    task = _task(name, rank, seed, batch_size)
    began = time.perf_counter()
    losses = train(task, rule, rate, steps)
    seconds = time.perf_counter() - began
    scores = task.scores(generate=job == "full") if len(losses) == steps else {}
    loss = scores.get("loss", math.inf)
    return {
        "job": job,
        "task": name,
        "rank": rank,
        "optimizer": rule.optimizer,
        "place": rule.place,
        "damping": rule.damping,
        "reg": rule.reg,
        "rate": rate,
        "seed": seed,
        "loss": loss if math.isfinite(loss) else None,
        "exact_match": scores.get("exact_match"),
        "loss_first_20": sum(losses[:20]) / len(losses[:20]) if math.isfinite(sum(losses[:20])) else None,
        "seconds": round(seconds, 2),
    }
