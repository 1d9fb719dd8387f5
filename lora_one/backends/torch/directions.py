"""The preconditioned gradients of many LoRA pairs, in the way that each kind of device is quick at.

An accelerator waits for launches: pairs that are alike are stacked, and go in as many of them as one pair would. A CPU
waits for memory: fresh pages cost as much as the products of narrow factors, so that results go to memory that is used
again while it is still in the cache; and factors that are wide enough for BLAS are not copied into stacks.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_one.core.factors import Factors
from lora_one.core.precondition import Damping, apply_inverses, damped_inverse, grams

from .linalg.narrow import narrow_matmul
from .ops import TorchOps

_STACKED_BELOW = {"cpu": 16}  # device type -> the rank from which pairs go one by one; elsewhere none does

# Bytes of factors that go together: on a CPU few enough that AdamW finds their directions in the cache; elsewhere all
# that a model usually has, and a bound on the memory it takes.
_TOGETHER = {"cpu": 4 * 2**20}
_TOGETHER_ELSEWHERE = 256 * 2**20


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
    alike: dict[Any, list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        a, b = pair
        if a.grad is None and b.grad is None:
            continue
        rank, stacked = a.shape[0], a.shape[0] < _STACKED_BELOW.get(a.device.type, a.shape[0] + 1)
        alike[stacked, rank, a.dtype, b.dtype, a.device, *((a.shape, b.shape) if stacked else ())].append(pair)
    memories: dict[Any, _Memory] = {}
    for (stacked, *_), some in alike.items():
        kind = some[0].lora_A.device, _wide(some[0])
        if kind not in memories:
            memories[kind] = _Memory(*kind)
        yield from (_stacked if stacked else _one_by_one)(memories[kind], some, reg, damping)


def _stacked(ops: "_Memory", pairs: list[LoraPair], reg: float, damping: Damping) -> Iterator[Batch]:
    count = max(1, ops.limit // sum(factor.nbytes for factor in pairs[0]))
    for start in range(0, len(pairs), count):
        some = pairs[start : start + count]
        ops.start_again()
        factors = Factors(*map(ops.stack, zip(*some, strict=True)))  # (n, r, in), (n, out, r)
        inverse_b, inverse_a = damped_inverse(ops, torch.stack(grams(ops, factors)), reg, damping)  # each (n, r, r)
        ops.start_again()
        gradient = Factors(*map(ops.stack, zip(*map(_gradient, some), strict=True)))
        direction = apply_inverses(ops, gradient, inverse_b, inverse_a)
        yield _batch(some, zip(*(side.unbind() for side in direction), strict=True))


def _one_by_one(ops: "_Memory", pairs: list[LoraPair], reg: float, damping: Damping) -> Iterator[Batch]:
    ops.start_again()
    sides = zip(*(grams(ops, Factors(*pair)) for pair in pairs), strict=True)
    inverses = [damped_inverse(ops, torch.stack(side), reg, damping).unbind() for side in sides]  # of B's, of A's
    some: list[LoraPair] = []
    its: list[Factors] = []
    ops.start_again()
    size = 0
    for pair, inverse_b, inverse_a in zip(pairs, *inverses, strict=True):
        its_size = sum(factor.nbytes for factor in pair)
        if some and size + its_size > ops.limit:
            yield _batch(some, its)
            some, its = [], []
            ops.start_again()
            size = 0
        size += its_size
        some.append(pair)
        its.append(apply_inverses(ops, _gradient(pair), inverse_b, inverse_a))
    yield _batch(some, its)


def _wide(pair: LoraPair) -> torch.dtype:
    a, b = pair
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _gradient(pair: LoraPair) -> Factors:
    return Factors(*(torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in pair))


def _batch(pairs: list[LoraPair], its: Iterable[Sequence[Tensor]]) -> Batch:
    return [
        (factor, direction.to(factor.dtype))
        for pair, both in zip(pairs, its, strict=True)
        for factor, direction in zip(pair, both, strict=True)
        if factor.grad is not None
    ]


class _Memory(TorchOps):
    """Stacks and products go, one after the other, into memory that is there already; what has no room is allocated."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.limit = _TOGETHER.get(device.type, _TOGETHER_ELSEWHERE)  # bytes of factors
        # Elsewhere the framework keeps freed memory itself. Factors and their directions, or gradients and directions.
        count = 2 * self.limit // dtype.itemsize if device.type in _TOGETHER else 0
        self._dtype = dtype
        self._all = torch.empty(count, dtype=dtype, device=device)
        self._used = 0

    def start_again(self) -> None:
        self._used = 0

    def at_least_float32(self, x: Tensor) -> Tensor:
        return x if x.dtype == self._dtype else x.to(self._dtype)

    def stack(self, xs: Sequence[Tensor], axis: int = 0) -> Tensor:
        if xs[0].dtype != self._dtype:
            return torch.stack(tuple(xs), axis)
        return torch.stack(tuple(xs), axis, out=self._take((len(xs), *xs[0].shape)))

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        if a.ndim == 2:
            return torch.mm(a, b, out=self._take((a.shape[0], b.shape[1])))
        return narrow_matmul(a, b, self._take((*a.shape[:-1], b.shape[-1])))

    def _take(self, shape: tuple[int, ...]) -> Tensor:
        start, count = self._used, math.prod(shape)
        if start + count > self._all.numel():
            return self._all.new_empty(shape)
        self._used += count
        return self._all[start : start + count].view(shape)
