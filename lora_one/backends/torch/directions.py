"""The preconditioned gradients of many LoRA pairs, in the way that each kind of device is quick at.

An accelerator waits for launches: pairs that are alike are stacked, and go in as many of them as one pair would. A CPU
waits for memory: a stacked copy costs as much as the products of narrow factors, and fresh pages more, so that there
the pairs go one by one, into memory that is used again while it is still in the cache.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_one.core.factors import Factors
from lora_one.core.precondition import Damping, apply_inverses, damped_inverse, grams, precondition

from .ops import TorchOps

_OPS = TorchOps()
_ONE_BY_ONE = {"cpu"}  # device types

# Bytes of factors that go together: one by one, few enough that AdamW finds their directions in the cache; stacked, all
# that a model usually has, and a bound on the memory it takes.
_CACHED_BYTES = 4 * 2**20
_STACKED_BYTES = 256 * 2**20


class LoraPair(NamedTuple):
    """The parameters of one LoRA layer."""

    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)


Batch = list[tuple[nn.Parameter, Tensor]]  # factors that have a gradient, and what it becomes


def directions(pairs: Iterable[LoraPair], reg: float, damping: Damping) -> Iterator[Batch]:
    """`lora_one.core.precondition` of the gradients of pairs, batch by batch; pairs without gradients are left out.

    A batch is to be used before the next is asked for, which may take its memory. In each factor's dtype, whatever the
    precision of global flags and autocast: the caller sees to that (`full_precision`).
    """
    on: dict[bool, list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        if pair.lora_A.grad is not None or pair.lora_B.grad is not None:
            on[pair.lora_A.device.type in _ONE_BY_ONE].append(pair)
    yield from _one_by_one(on[True], reg, damping)
    yield from _stacked(on[False], reg, damping)


def _one_by_one(pairs: list[LoraPair], reg: float, damping: Damping) -> Iterator[Batch]:
    of_rank: dict[Any, list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        of_rank[pair.lora_A.shape[0], _wide(pair)].append(pair)
    for (_, dtype), alike in of_rank.items():
        memory = _Memory(_CACHED_BYTES, dtype)
        gram = zip(*(grams(memory, Factors(*pair)) for pair in alike), strict=True)
        inverses = damped_inverse(_OPS, torch.stack([torch.stack(side) for side in gram]), reg, damping)  # (2, n, r, r)
        memory.start_again()
        batch: Batch = []
        for pair, inverse_b, inverse_a in zip(alike, *(side.unbind() for side in inverses), strict=True):
            if batch and not memory.has_room_for(pair):
                yield batch
                batch = []
                memory.start_again()
            direction = apply_inverses(memory, _gradient(pair), inverse_b, inverse_a)
            batch += _where_there_is_a_gradient(pair, direction)
        yield batch


def _stacked(pairs: list[LoraPair], reg: float, damping: Damping) -> Iterator[Batch]:
    of_kind: dict[Any, list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        a, b = pair
        of_kind[a.shape, b.shape, a.dtype, b.dtype, a.device].append(pair)
    for alike in of_kind.values():
        count = max(1, _STACKED_BYTES // sum(factor.nbytes for factor in alike[0]))
        for start in range(0, len(alike), count):
            some = alike[start : start + count]
            gradient = Factors(*map(torch.stack, zip(*map(_gradient, some), strict=True)))
            factors = Factors(*map(torch.stack, zip(*some, strict=True)))  # (n, r, in), (n, out, r)
            direction = precondition(_OPS, factors, gradient, reg, damping)
            batch: Batch = []
            for pair, *its in zip(some, *(side.unbind() for side in direction), strict=True):
                batch += _where_there_is_a_gradient(pair, Factors(*its))
            yield batch


class _Memory(TorchOps):
    """Products of matrices go, one after the other, into memory that is there already."""

    def __init__(self, size: int, dtype: torch.dtype):
        self._all = torch.empty(size // dtype.itemsize, dtype=dtype)
        self._used = 0

    def start_again(self) -> None:
        self._used = 0

    def has_room_for(self, pair: LoraPair) -> bool:
        return self._used + sum(factor.numel() for factor in pair) <= self._all.numel()

    def at_least_float32(self, x: Tensor) -> Tensor:
        return x if x.dtype == self._all.dtype else x.to(self._all.dtype)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        rows, columns = a.shape[0], b.shape[1]
        start = self._used
        self._used += rows * columns
        if self._used > self._all.numel():  # a pair that is larger than all of it
            return torch.mm(a, b)
        return torch.mm(a, b, out=self._all.as_strided((rows, columns), (columns, 1), start))


def _wide(pair: LoraPair) -> torch.dtype:
    return torch.promote_types(torch.promote_types(pair.lora_A.dtype, pair.lora_B.dtype), torch.float32)


def _gradient(pair: LoraPair) -> Factors:
    return Factors(*(torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in pair))


def _where_there_is_a_gradient(pair: LoraPair, direction: Factors) -> Batch:
    return [(p, its.to(p.dtype)) for p, its in zip(pair, direction, strict=True) if p.grad is not None]
