"""Sums over the processes of a data-parallel run, so that all of them compute the same start."""

import torch
from torch import Tensor
from torch import distributed as dist

from lora_one.backends.torch.processes import is_parallel
from lora_one.core.fold import FoldState, merge_all
from lora_one.core.ops import Ops


class Replicas:
    """The processes with batches of their own, which compute one start together.

    Attributes:
        several: whether there are others than this one.

    Args:
        alone: whether all processes read the same batches, as with tensor parallelism.
    """

    def __init__(self, alone: bool):
        self.several = is_parallel() and not alone

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all of them, in place. Every process must call it, in the same order."""
        if self.several:
            dist.all_reduce(x)
        return x

    def mean(self, total: float, count: int, device: torch.device) -> tuple[float, int]:
        """Return (sum of all totals / sum of all counts, sum of all counts)."""
        sums = self.sum(torch.tensor([total, float(count)], dtype=torch.float64, device=device))
        return float(sums[0] / sums[1]), int(sums[1])

    def merge(self, ops: Ops, state: FoldState) -> FoldState:
        """Return the state of the batches of all of them together, the same on each.

        Rounding may differ from machine to machine, so the first process sends its result to the others.
        """
        if not self.several:
            return state
        own = torch.cat([x.reshape(-1) for x in state])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        together = merge_all(ops, [_unpacked(packed, state) for packed in gathered])
        merged = torch.cat([x.reshape(-1) for x in together])
        dist.broadcast(merged, src=0)
        return _unpacked(merged, state)


def all_agree(decision: bool, device: torch.device) -> bool:
    """Return whether all processes decide for it."""
    against = torch.tensor(0 if decision else 1, device=device)
    if is_parallel():
        dist.all_reduce(against)
    return int(against) == 0


def _unpacked(packed: Tensor, like: FoldState) -> FoldState:
    parts = packed.split([x.numel() for x in like])
    return FoldState(*(part.view(x.shape) for part, x in zip(parts, like, strict=True)))
