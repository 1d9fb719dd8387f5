"""Short trainings of models without data, which the tests of this folder share."""

from typing import NamedTuple

import torch
from torch import nn

import lora_one
from lora_one.backends.torch import LoraOneAdamW
from lora_one.backends.torch.deferred import PairStarts
from lora_one.report.deferred import DeferredReport
from tests.backends.torch.models import Case, mlp

CONFIG = lora_one.Config(rank=4)


class Run(NamedTuple):
    """A model that `init` got without batches, its report and its optimizer, and what to train on."""

    model: nn.Module
    report: DeferredReport
    optimizer: torch.optim.AdamW
    case: Case

    @property
    def pairs(self):
        """The pairs of the start, in the order of the report."""
        assert isinstance(self.optimizer, LoraOneAdamW) and isinstance(self.optimizer._start, PairStarts)
        return self.optimizer._start.pairs

    def backward(self, i: int, factor: float = 1.0) -> torch.Tensor:
        batch = self.case.batches[i % len(self.case.batches)]
        loss = self.model(**batch).loss if self.case.loss_fn is None else self.case.loss_fn(self.model, batch)
        (loss * factor).backward()
        return loss

    def train(self, first: int, last: int, factor: float = 1.0) -> None:
        """Take the steps first, ..., last - 1, each on a batch."""
        for i in range(first, last):
            self.backward(i, factor)
            self.optimizer.step()
            self.optimizer.zero_grad()


def begun(make=mlp, dtype: torch.dtype = torch.float32, config: lora_one.Config = CONFIG, **options) -> Run:
    """Return a run before its first step; `options` are the optimizer's."""
    case = make()
    batches = [tuple(x.to(dtype) for x in b) if isinstance(b, tuple) else b for b in case.batches]
    model, report = lora_one.init(case.model.to(dtype), config=config)
    model.eval()  # no dropout
    return Run(model, report, lora_one.optimizer(model, 1e-2, **options), case._replace(batches=batches))


def same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether all parameters of two models agree to the bit."""
    return all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))
