"""Sums over the processes of a data-parallel run, so that all of them compute the same start."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from lora_one.backends.torch.processes import Processes, is_parallel
from lora_one.core.fold import FoldState, merge_all
from lora_one.core.ops import Ops


class Replicas:
    """The processes with batches of their own, which compute one start together.

    Attributes:
        size: how many there are.

    Args:
        processes: all that make this call.
        alone: whether all of them read the same batches, as with tensor parallelism.
    """

    def __init__(self, processes: Processes, alone: bool):
        self.size = dist.get_world_size() if is_parallel() and not alone else 1
        self._processes = processes

    @property
    def several(self) -> bool:
        """Whether there are others than this one."""
        return self.size > 1

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all of them, in place. Every process must call it, in the same order."""
        if self.several:
            dist.all_reduce(x)
        return x

    def mean(self, total: float, count: int, device: torch.device) -> tuple[float, int]:
        """Return (sum of all totals / sum of all counts, sum of all counts)."""
        sums = self.sum(torch.tensor([total, float(count)], dtype=torch.float64, device=device))
        return float(sums[0] / sums[1]), int(sums[1])

    def merge(self, ops: Ops, states: Iterable[FoldState]) -> Iterator[FoldState]:
        """Yield the states of the batches of all of them together, the same on each.

        The processes share the states out, and each merges its own: it gets what all have of them and sends the result
        to all. So none holds or sends much more than twice its own states, however many processes there are.
        """
        if not self.several:
            yield from states
            return
        packed, shapes, rank = [], [], dist.get_rank()
        for index, state in enumerate(states):
            shapes.append([x.shape for x in state])
            packed.append(torch.cat([x.reshape(-1) for x in state]))
            parts = [torch.empty_like(packed[-1]) for _ in range(self.size)] if index % self.size == rank else None
            dist.gather(packed[-1], parts, dst=index % self.size)
            if parts is not None:
                together = merge_all(ops, [_unpacked(part, shapes[-1]) for part in parts])
                packed[-1] = torch.cat([x.reshape(-1) for x in together])
        self._processes.count()  # nobody waits for the result of one that has failed
        for index, merged in enumerate(packed):
            dist.broadcast(merged, src=index % self.size)
            yield _unpacked(merged, shapes[index])


def all_agree(decision: bool, device: torch.device) -> bool:
    """Return whether all processes decide for it."""
    against = torch.tensor(0 if decision else 1, device=device)
    if is_parallel():
        dist.all_reduce(against)
    return int(against) == 0


def _unpacked(packed: Tensor, shapes: Sequence[torch.Size]) -> FoldState:
    parts = packed.split([shape.numel() for shape in shapes])
    return FoldState(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))
