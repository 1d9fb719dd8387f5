"""What a contender is given: a pretrained model, data, and how to tell how well it does."""

import copy
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Task:
    """One fine-tuning job.

    Attributes:
        base: the pretrained model; runs work on copies of it.
        train, valid, test: items; `valid` chooses learning rates, `test` is only reported.
        fresh: test items that nobody had looked at when the protocol was fixed.
        collate: items -> a batch.
        loss_fn: (model, batch) -> mean loss.
        score: (model, items) -> the share that it gets right: exact match or accuracy.
        targets: of LoRA: every linear layer but the output layer, as a regular expression of whole module paths.
        modules_to_save: the new head, where there is one: trained along, whole.
        steps, batch_size: of a run.
        init_batches: batches that a gradient-based start reads.
        clock: of the times that are told: this process's processor time, so that a busy machine does not count.
    """

    name: str
    base: nn.Module
    train: Sequence[Any]
    valid: Sequence[Any]
    test: Sequence[Any]
    fresh: Sequence[Any]
    collate: Callable[[Sequence[Any]], Any]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    score: Callable[[nn.Module, Sequence[Any]], float]
    steps: int
    batch_size: int
    targets: str
    init_batches: int = 8
    modules_to_save: tuple[str, ...] = ()
    clock: Callable[[], float] = time.process_time

    def digest(self) -> str:
        """What tells that two runs had the same data: of the items in their order, and how many a step sees."""
        items = (self.train, self.valid, self.fresh, self.steps, self.batch_size, self.init_batches)
        return f"{zlib.crc32(repr(items).encode()):08x}"

    def model(self) -> nn.Module:
        """A copy of the pretrained model."""
        return copy.deepcopy(self.base)

    def start_batches(self, seed: int, count: int | None = None) -> list[Any]:
        """The batches that a gradient-based start reads: `count` of them, `init_batches` by default."""
        size = (count or self.init_batches) * self.batch_size
        items = random.Random(f"start/{seed}").sample(list(self.train), min(size, len(self.train)))
        return [self.collate(items[i : i + self.batch_size]) for i in range(0, len(items), self.batch_size)]

    def training_batches(self, seed: int) -> Iterator[Any]:
        """`steps` batches: seeded permutations of the training items, one after the other."""
        rng, queue = random.Random(f"train/{seed}"), []
        for _ in range(self.steps):
            if len(queue) < self.batch_size:
                queue = rng.sample(list(self.train), len(self.train))
            items, queue = queue[: self.batch_size], queue[self.batch_size :]
            yield self.collate(items)

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, items: Sequence[Any]) -> float:
        """The loss over items, in batches of 64 of the same size but the last."""
        model.eval()
        parts = [items[i : i + 64] for i in range(0, len(items), 64)]
        total = sum(float(self.loss_fn(model, self.collate(part))) * len(part) for part in parts)
        return total / len(items)
