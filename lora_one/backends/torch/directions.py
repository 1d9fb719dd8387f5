"""The preconditioned gradients of many LoRA pairs, computed in the way that is fast on each kind of device.

An accelerator waits for launches. Pairs with the same shapes are stacked, so that all of them take as many launches as
one pair would.

A CPU waits for memory: fresh pages cost as much as the products of narrow factors. Results therefore go into memory
that is used again while it is still in the cache, and factors that are wide enough for BLAS are not copied into stacks.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_one.core.factors import Factors
from lora_one.core.precondition import Damping, apply_inverses, damped_inverse, grams

from .attachment.sharding import is_dtensor
from .linalg.narrow import narrow_matmul
from .ops import TorchOps
from .pairs import STACK_BYTES, Batch, LoraPair, as_matrix, gradient_of, stacks
from .spread_directions import spread_directions

_STACKED_BELOW_RANK = {"cpu": 16}  # per device type; on any other, pairs of every rank are stacked

# Bytes of factors that are computed together, per device type. On a CPU few enough for AdamW to find their directions
# in the cache. Elsewhere the bound limits the memory this takes; most models have less.
_BATCH_BYTES = {"cpu": 4 * 2**20}


def directions(pairs: Iterable[LoraPair], reg: float, damping: Damping) -> Iterator[Batch]:
    """Yield the gradients of LoRA pairs after `lora_one.core.precondition`, batch by batch.

    Directions have their factor's dtype. Pairs without gradients are left out. Use a batch before you ask for the next
    one, which may overwrite its memory. The caller sets the precision of products (`full_precision`).
    """
    groups: dict[Any, list[LoraPair]] = defaultdict(list)
    spread = []
    kept: dict[int, Tensor] = {}  # id of the matrix that stands for a factor of a convolution -> the factor
    for pair in (_as_matrices(pair, kept) for pair in pairs):
        a, b = pair
        if a.grad is None and b.grad is None:
            continue
        if is_dtensor(a) or is_dtensor(b):
            spread.append(pair)
            continue
        rank, stacked = a.shape[0], a.shape[0] < _STACKED_BELOW_RANK.get(a.device.type, a.shape[0] + 1)
        groups[stacked, rank, a.dtype, b.dtype, a.device, *((a.shape, b.shape) if stacked else ())].append(pair)
    arenas: dict[tuple[torch.device, torch.dtype], _Arena] = {}
    for (stacked, *_), group in groups.items():
        kind = group[0].lora_A.device, _wide_dtype(group[0])
        if kind not in arenas:
            arenas[kind] = _Arena(*kind)
        for batch in (_stacked if stacked else _one_by_one)(arenas[kind], group, reg, damping):
            yield [_as_factor(kept, *each) for each in batch] if kept else batch
    yield from spread_directions(spread, reg, damping)


def _as_matrices(pair: LoraPair, kept: dict[int, Tensor]) -> LoraPair:
    """Return a pair as matrices, with their gradients, and note which factor each new one stands for."""
    if all(factor.ndim <= 2 for factor in pair):
        return pair
    matrices = []
    for factor in pair:
        matrix: Any = as_matrix(factor.detach())
        matrix.grad = None if factor.grad is None else as_matrix(factor.grad)
        kept[id(matrix)] = factor
        matrices.append(matrix)
    return LoraPair(*matrices)


def _as_factor(kept: dict[int, Tensor], matrix: Any, direction: Tensor) -> tuple[Any, Tensor]:
    factor: Any = kept.get(id(matrix), matrix)
    return factor, direction.view(factor.shape)


def _stacked(arena: "_Arena", pairs: list[LoraPair], reg: float, damping: Damping) -> Iterator[Batch]:
    for batch in stacks(pairs, arena.batch_bytes):
        arena.clear()
        factors = Factors(*map(arena.stack, zip(*batch, strict=True)))  # (n, r, in), (n, out, r)
        inverse_b, inverse_a = damped_inverse(arena, torch.stack(grams(arena, factors)), reg, damping)  # each (n, r, r)
        arena.clear()
        gradient = Factors(*map(arena.stack, zip(*map(gradient_of, batch), strict=True)))
        direction = apply_inverses(arena, gradient, inverse_b, inverse_a)
        yield _batch(batch, zip(*(side.unbind() for side in direction), strict=True))


def _one_by_one(arena: "_Arena", pairs: list[LoraPair], reg: float, damping: Damping) -> Iterator[Batch]:
    arena.clear()
    sides = zip(*(grams(arena, Factors(*pair)) for pair in pairs), strict=True)
    inverses = [damped_inverse(arena, torch.stack(side), reg, damping).unbind() for side in sides]  # of B's, of A's
    batch: list[LoraPair] = []
    batch_directions: list[Factors] = []
    arena.clear()
    batch_size = 0
    for pair, inverse_b, inverse_a in zip(pairs, *inverses, strict=True):
        size = sum(factor.nbytes for factor in pair)
        if batch and batch_size + size > arena.batch_bytes:
            yield _batch(batch, batch_directions)
            batch, batch_directions = [], []
            arena.clear()
            batch_size = 0
        batch_size += size
        batch.append(pair)
        batch_directions.append(apply_inverses(arena, gradient_of(pair), inverse_b, inverse_a))
    yield _batch(batch, batch_directions)


def _wide_dtype(pair: LoraPair) -> torch.dtype:
    a, b = pair
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _batch(pairs: list[LoraPair], pair_directions: Iterable[Sequence[Tensor]]) -> Batch:
    return [
        (factor, direction.to(factor.dtype))
        for pair, sides in zip(pairs, pair_directions, strict=True)
        for factor, direction in zip(pair, sides, strict=True)
        if factor.grad is not None
    ]


class _Arena(TorchOps):
    """An arena: memory for the stacks and products of one batch, taken one after the other, and cleared all at once.

    It is handed to `lora_one.core` as its array operations, so that their results are written into it. A result that
    does not fit gets memory of its own.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.batch_bytes = _BATCH_BYTES.get(device.type, STACK_BYTES)
        # Twice: for factors and their directions, or gradients and directions. Other devices' allocators keep freed
        # memory themselves, so that there the arena stays empty.
        count = 2 * self.batch_bytes // dtype.itemsize if device.type in _BATCH_BYTES else 0
        self._dtype = dtype
        self._memory = torch.empty(count, dtype=dtype, device=device)
        self._used = 0

    def clear(self) -> None:
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
        if start + count > self._memory.numel():
            return self._memory.new_empty(shape)
        self._used += count
        return self._memory[start : start + count].view(shape)
