"""The axes of a kernel: a stack of matrices with input and output axes, and its LoRA factors in the same form.

Flax kernels are (in..., out...): a fused attention projection is (embed, heads, head_dim), and layers stacked by
`nnx.vmap` or `nnx.scan` carry their index in front. Their factors are lora_a (stack..., in..., r) and lora_b (stack...,
r, out...), the convention of qwix and tunix. Each matrix of the stack is one LoRA pair of the spec.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_one.core.factors import Factors

from .tap import Tap


@dataclass(frozen=True)
class Layout:
    """The meaning of each axis of a kernel, by its index; every axis is in exactly one group.

    Attributes:
        shape: shape of the kernel.
        stack: axes that count independent matrices.
        ins: axes that are contracted with the input.
        outs: axes that the output gets.
        lifts: the axes along which `nn.scan` and `nn.vmap` cut the kernel of a Linen layer, outermost first; empty
            elsewhere. They cut its factors along the same axes: see `lifting`.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    lifts: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """The number of matrices in the stack; 1 without a stack."""
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
        """Return lora_a's partition spec from the kernel's, one entry per axis: that of the input axes, r whole."""
        return (*(spec[axis] for axis in self.stack + self.ins), None)

    def b_spec(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return lora_b's partition spec from the kernel's, one entry per axis: r whole, that of the output axes."""
        return (*(spec[axis] for axis in self.stack), None, *(spec[axis] for axis in self.outs))

    @partial(jax.jit, static_argnums=0)  # without jit, each operation would be compiled separately
    def leaves(self, pairs: list[Factors]) -> tuple[Array, Array]:
        """Return (lora_a, lora_b) from the spec's pairs, lora_A (r, in) and lora_B (out, r), one per matrix."""
        a = jnp.stack([pair.lora_A.T for pair in pairs])  # (n, in, r)
        b = jnp.stack([pair.lora_B.T for pair in pairs])  # (n, r, out)
        return a.reshape(self.a_shape(a.shape[-1])), b.reshape(self.b_shape(b.shape[1]))

    @partial(jax.jit, static_argnums=0)
    def pairs(self, a: Array, b: Array) -> list[Factors]:
        """Return the spec's pairs from the leaves: the inverse of `leaves`."""
        matrices_a = a.reshape(self.count, self.in_features, a.shape[-1])
        matrices_b = b.reshape(self.count, a.shape[-1], self.out_features)
        return [Factors(x.T, y.T) for x, y in zip(matrices_a, matrices_b, strict=True)]

    def product(self, a: Array, b: Array) -> Array:
        """Return a b in the kernel's shape and order of axes, in float32 or wider."""
        wide = jnp.promote_types(a.dtype, jnp.float32)
        rank = a.shape[-1]
        a = a.reshape(self.count, self.in_features, rank).astype(wide)
        b = b.reshape(self.count, rank, self.out_features).astype(wide)
        delta = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)  # (n, in, out)
        return self._in_kernels_order(delta, self.stack + self.ins + self.outs)

    def added(self, kernel: Array, a: Array, b: Array, scale: float) -> Array:
        """Return kernel + scale * a b, rounded once to the kernel's dtype."""
        delta = scale * self.product(a, b)
        return (kernel.astype(delta.dtype) + delta).astype(kernel.dtype)

    def watched(self, kernel: Array, tap: Tap) -> Array:
        """Return the kernel of a single matrix, whose gradient a tap reads."""
        order = self.outs + self.ins
        matrix = jnp.transpose(kernel, order).reshape(self.out_features, self.in_features)
        return self._in_kernels_order(tap.watch_weight(matrix), order)

    def cuttable(self, leaf: Array) -> Array:
        """Return a factor with its stacked axes moved from the front to the places that `lifts` says."""
        for depth in reversed(range(len(self.lifts))):  # the innermost first, behind those that are still in front
            axis = self.lifts[depth]
            leaf = jnp.moveaxis(leaf, depth, axis + (depth if axis >= 0 else leaf.ndim))
        return leaf

    def _in_kernels_order(self, x: Array, order: tuple[int, ...]) -> Array:
        """Return an array of the kernel's entries in its shape.

        Args:
            x: the entries, with the kernel's axes in the given order, some of them merged.
            order: indices of the kernel's axes.
        """
        x = x.reshape(self._sizes(order))
        return jnp.transpose(x, [order.index(axis) for axis in range(len(order))])

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)


def plain_layout(shape: tuple[int, ...], ins: int, outs: int) -> Layout:
    """Return the layout (stack..., in..., out...) with `ins` input and `outs` output axes; the first axes are stack."""
    ndim = len(shape)
    return Layout(
        shape,
        stack=tuple(range(ndim - ins - outs)),
        ins=tuple(range(ndim - ins - outs, ndim - outs)),
        outs=tuple(range(ndim - outs, ndim)),
    )


class EinsumAxes(NamedTuple):
    """The letters of the kernel in "x,kernel->y", each group in the kernel's order."""

    shared: str  # in x, in the kernel and in y
    contracted: str  # in x and not in y
    new: str  # in y and not in x


def einsum_axes(equation: str) -> EinsumAxes:
    """Return the groups of the kernel's letters in "x,kernel->y".

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
    return EinsumAxes(shared, contracted, new)


def einsum_layout(shape: tuple[int, ...], equation: str) -> Layout:
    """Return the layout of the kernel in "x,kernel->y"; axes in front of the equation's letters are stack.

    Raises:
        ValueError: the equation is not a linear map of x.
    """
    kernel = equation.replace(" ", "").split("->")[0].split(",")[1]
    stacked = len(shape) - len(kernel)
    groups = [tuple(stacked + kernel.index(letter) for letter in group) for group in einsum_axes(equation)]
    shared, contracted, new = groups
    return Layout(shape, (*range(stacked), *shared), contracted, new)
