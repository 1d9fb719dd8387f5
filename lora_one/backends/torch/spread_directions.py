"""The preconditioned gradients of LoRA pairs whose factors are spread over processes, as DTensors.

Each factor is gathered along its rank, and the other axis may stay where it is: (B^T B) and (A A^T) are then sums over
processes of r x r matrices, and each process computes its own part of the direction. FSDP2 spreads the first axis, so
that of a stack of pairs the lora_A and their gradients are gathered, and of the lora_B only the r x r sums are sent.
Tensor parallelism splits the other axis of one factor.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_one.core.factors import Factors
from lora_one.core.precondition import Damping, apply_inverses, damped_inverse, grams

from .attachment.sharding import from_part, is_dtensor
from .ops import TorchOps
from .pairs import STACK_BYTES, Batch, LoraPair, stacks

_OPS = TorchOps()
_LONG = Factors(1, 0)  # the axis that is not the rank


def spread_directions(pairs: Sequence[LoraPair], reg: float, damping: Damping) -> Iterator[Batch]:
    """Yield the directions of pairs of DTensors, as `directions` does. Every process must take all of them."""
    kinds: dict[Any, list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        factors: tuple[Any, ...] = pair
        kinds[tuple((_mesh(x), x.shape, x.dtype, x.grad is None) for x in factors)].append(pair)
    for kind in kinds.values():
        for stack in stacks(kind, STACK_BYTES):
            yield _of_stack(stack, reg, damping)


def _of_stack(pairs: list[LoraPair], reg: float, damping: Damping) -> Batch:
    factors = Factors(*(_Stack(list(xs), axis) for xs, axis in zip(zip(*pairs, strict=True), _LONG, strict=True)))
    of_b, of_a = grams(_OPS, Factors(*(stack.local for stack in factors)))  # of this process's parts, each (n, r, r)
    sums = torch.stack((factors.lora_B.summed(of_b), factors.lora_A.summed(of_a)))
    inverse_b, inverse_a = damped_inverse(_OPS, sums, reg, damping)
    gradient = Factors(*(stack.gradient() for stack in factors))
    direction = apply_inverses(_OPS, gradient, inverse_b, inverse_a)
    return [
        (factor, of_factor)
        for stack, local in zip(factors, direction, strict=True)
        if stack.has_gradient
        for factor, of_factor in zip(stack.factors, stack.spread(local), strict=True)
    ]


class _Stack:
    """Factors of one side, of equal shapes.

    Attributes:
        local: this process's part of their stack, with the whole rank.
    """

    def __init__(self, factors: list[Any], long: int):
        self.factors = factors
        self.has_gradient = factors[0].grad is not None
        self._is_spread = is_dtensor(factors[0])  # tensor parallelism splits one factor of a pair
        self._long = long + 1  # behind the axis of the stack
        self.local = self._gathered(factors)

    def gradient(self) -> Tensor:
        """Return the gradients in the form of `local`; zeros if there are none."""
        if not self.has_gradient:
            return torch.zeros_like(self.local)
        return self._gathered([x.grad for x in self.factors])

    def summed(self, gram: Tensor) -> Tensor:
        """Return the sum of r x r matrices, (n, r, r), over the processes with different parts."""
        if not self._is_spread:
            return gram
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parts = [Replicate() if x.is_replicate() else Partial() for x in self._kept()]
        return DTensor.from_local(gram, self.factors[0].device_mesh, parts, run_check=False).full_tensor()

    def spread(self, local: Tensor) -> list[Tensor]:
        """Return directions in the form of `local` as DTensors in the form of their factors."""
        like = self.factors[0]
        if not self._is_spread:
            return list(local.to(like.dtype).unbind())
        stack = self._dtensor(local.to(like.dtype), self._kept()).redistribute(placements=self._placements())
        return [from_part(x, like, like.placements, like.shape) for x in stack.to_local().unbind()]

    def _gathered(self, xs: list[Any]) -> Tensor:
        if not self._is_spread:
            return torch.stack(xs)
        xs = [x.redistribute(placements=self.factors[0].placements) for x in xs]
        stack = self._dtensor(torch.stack([x.to_local() for x in xs]), self._placements())
        return stack.redistribute(placements=self._kept()).to_local()

    def _dtensor(self, local: Tensor, placements: Sequence[Any]) -> Any:
        like = self.factors[0]
        return from_part(local, like, placements, (len(local), *like.shape))

    def _placements(self) -> list[Any]:
        """Return the placements of the stack."""
        from torch.distributed.tensor import Shard

        return [Shard(x.dim + 1) if x.is_shard() else x for x in self.factors[0].placements]

    def _kept(self) -> list[Any]:
        """Return them without those that spread the rank."""
        from torch.distributed.tensor import Replicate

        return [x if x.is_shard(self._long) else Replicate() for x in self._placements()]


def _mesh(x: Any) -> Any:
    return (x.device_mesh, x.placements) if is_dtensor(x) else None
