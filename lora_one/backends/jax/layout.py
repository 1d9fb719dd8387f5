"""A kernel of many axes as a stack of matrices, and its LoRA factors likewise.

Flax kernels are (in..., out...): a fused attention projection is (embed, heads, head_dim), and layers stacked by
`nnx.vmap` or `nnx.scan` carry their index in front. Their factors are lora_a (stack..., in..., r) and lora_b (stack...,
r, out...), the convention of qwix and tunix; each matrix of the stack is one LoRA pair of the spec.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_one.core.factors import Factors
from lora_one.core.sketch import Side


@dataclass(frozen=True)
class Layout:
    """What each axis of a kernel is, by its index; every axis is in exactly one group.

    Attributes:
        shape: of the kernel.
        stack: axes that count independent matrices.
        ins: axes that are contracted with the input.
        outs: axes that the output gets.
        lifts: where `nn.scan` and `nn.vmap` cut the kernel of a Linen layer, outermost first; empty elsewhere. They
            cut its factors at the same places: see `lifting`.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    lifts: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Matrices in the stack; 1 where there is none."""
        return math.prod(self._sizes(self.stack))

    @property
    def in_features(self) -> int:
        return math.prod(self._sizes(self.ins))

    @property
    def out_features(self) -> int:
        return math.prod(self._sizes(self.outs))

    def a_shape(self, rank: int) -> tuple[int, ...]:
        return (*self._sizes(self.stack), *self._sizes(self.ins), rank)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        return (*self._sizes(self.stack), rank, *self._sizes(self.outs))

    def a_spec(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """The kernel's sharding, an entry an axis, as that of lora_a: the input side's, and the rank's whole."""
        return (*(spec[axis] for axis in self.stack + self.ins), None)

    def b_spec(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """As `a_spec`, for lora_b: the output side's."""
        return (*(spec[axis] for axis in self.stack), None, *(spec[axis] for axis in self.outs))

    @partial(jax.jit, static_argnums=0)  # operation by operation, each would be compiled on its own
    def leaves(self, pairs: list[Factors]) -> tuple[Array, Array]:
        """(lora_a, lora_b) from one pair of the spec a matrix: lora_A (r, in), lora_B (out, r)."""
        a = jnp.stack([pair.lora_A.T for pair in pairs])  # (n, in, r)
        b = jnp.stack([pair.lora_B.T for pair in pairs])  # (n, r, out)
        return a.reshape(self.a_shape(a.shape[-1])), b.reshape(self.b_shape(b.shape[1]))

    def probed(self, side: Side, factors: list[Array]) -> tuple[Array, Array]:
        """(lora_a, lora_b) from one probe per matrix, all on one side: the other side is zero."""
        if side == "A":
            pairs = [Factors(a, jnp.zeros((self.out_features, a.shape[0]), a.dtype)) for a in factors]
        else:
            pairs = [Factors(jnp.zeros((b.shape[1], self.in_features), b.dtype), b) for b in factors]
        a, b = self.leaves(pairs)
        return a, b

    @partial(jax.jit, static_argnums=0)
    def pairs(self, a: Array, b: Array) -> list[Factors]:
        """The inverse of `leaves`."""
        return [Factors(*pair) for pair in zip(self.lora_As(a), self.lora_Bs(b), strict=True)]

    def lora_As(self, a: Array) -> list[Array]:
        """The spec's lora_A, (r, in), of each matrix, from the leaf."""
        return [one.T for one in a.reshape(self.count, self.in_features, a.shape[-1])]

    def lora_Bs(self, b: Array) -> list[Array]:
        """The spec's lora_B, (out, r), of each matrix, from the leaf."""
        return [one.T for one in b.reshape(self.count, -1, self.out_features)]

    def product(self, a: Array, b: Array) -> Array:
        """What B A adds to the kernel, in its shape and order of axes, in float32 or wider."""
        wide = jnp.promote_types(a.dtype, jnp.float32)
        rank = a.shape[-1]
        a = a.reshape(self.count, self.in_features, rank).astype(wide)
        b = b.reshape(self.count, rank, self.out_features).astype(wide)
        delta = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)  # (n, in, out)
        order = self.stack + self.ins + self.outs
        delta = delta.reshape([self.shape[axis] for axis in order])
        return jnp.transpose(delta, [order.index(axis) for axis in range(len(order))])

    def cuttable(self, leaf: Array) -> Array:
        """A factor with its stacked axes where `lifts` says, in the place of the front."""
        for depth in reversed(range(len(self.lifts))):  # the innermost first, behind those that are still in front
            axis = self.lifts[depth]
            leaf = jnp.moveaxis(leaf, depth, axis + (depth if axis >= 0 else leaf.ndim))
        return leaf

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)


def plain_layout(shape: tuple[int, ...], ins: int, outs: int) -> Layout:
    """The layout (stack..., in..., out...) with so many axes of the latter two each; the rest, in front, is stack."""
    rank = len(shape)
    return Layout(
        shape,
        stack=tuple(range(rank - ins - outs)),
        ins=tuple(range(rank - ins - outs, rank - outs)),
        outs=tuple(range(rank - outs, rank)),
    )


def einsum_groups(equation: str) -> tuple[str, str, str]:
    """The kernel's letters in "x,kernel->y": (shared by all three, contracted, new in y), each in the kernel's order.

    Raises:
        ValueError: a letter of the kernel that is in neither x nor y.
    """
    inputs, result = equation.replace(" ", "").split("->")
    x, kernel = inputs.split(",")
    shared = "".join(c for c in kernel if c in x and c in result)
    contracted = "".join(c for c in kernel if c in x and c not in result)
    new = "".join(c for c in kernel if c not in x and c in result)
    if len(shared) + len(contracted) + len(new) != len(kernel) or "..." in kernel:
        raise ValueError(f"{equation!r} is not a linear map of x: every axis of the kernel must be in x or in y")
    return shared, contracted, new
