"""The axes of a kernel: a stack of matrices with input and output axes, and its LoRA factors in the same form.

Flax kernels are (in..., out...): a fused attention projection is (embed, heads, head_dim). Their factors are lora_a
(in..., r) and lora_b (r, out...), the convention of qwix and tunix. Layers stacked by `vmap` or `scan` carry their
index along the axis that these are told, the first if nothing is said, and their factors along the same one. Each
matrix of the stack is one LoRA pair of the spec.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
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
        lifts: the axes along which `scan` and `vmap` cut the kernel, and its factors likewise, outermost first. Each is
            an index, perhaps negative, into the axes that were left, as the transformation was told it. They are the
            first axes of `stack`; a layer's own stack is after them.
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

    @property
    def lifted_sizes(self) -> tuple[int, ...]:
        """The sizes of the axes of `lifts`, outermost first."""
        return self._sizes(self.stack[: len(self.lifts)])

    def rank(self, a: Any) -> int:
        """Return r of a lora_a."""
        return int(a.shape[self.orders[0].index(a.ndim - 1)])

    def a_shape(self, rank: int) -> tuple[int, ...]:
        return self._cut((*self._sizes(self.stack), *self._sizes(self.ins), rank))

    def b_shape(self, rank: int) -> tuple[int, ...]:
        return self._cut((*self._sizes(self.stack), rank, *self._sizes(self.outs)))

    def a_spec(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return lora_a's partition spec from the kernel's, one entry per axis: that of the input axes, r whole."""
        return self._cut((*(spec[axis] for axis in self.stack + self.ins), None))

    def b_spec(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return lora_b's partition spec from the kernel's, one entry per axis: r whole, that of the output axes."""
        return self._cut((*(spec[axis] for axis in self.stack), None, *(spec[axis] for axis in self.outs)))

    def from_matrices(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Return (lora_a, lora_b) from (n, in, r) and (n, r, out)."""
        stack, rank = self._sizes(self.stack), a.shape[-1]
        a = a.reshape(*stack, *self._sizes(self.ins), rank)
        b = b.reshape(*stack, rank, *self._sizes(self.outs))
        order_a, order_b = self.orders
        return jnp.transpose(a, order_a), jnp.transpose(b, order_b)

    def matrices(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Return (n, in, r) and (n, r, out) from the leaves: the inverse of `from_matrices`."""
        rank = self.rank(a)
        return (
            self.in_front(a).reshape(self.count, self.in_features, rank),
            self.in_front(b).reshape(self.count, rank, self.out_features),
        )

    def magnitude_spec(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the partition spec of DoRA's magnitudes from the kernel's: that of the output axes."""
        return tuple(spec[axis] for axis in self.stack + self.outs)

    @partial(jax.jit, static_argnums=0)  # without jit, each operation would be compiled separately
    def leaves(self, pairs: list[Factors]) -> tuple[Array, Array]:
        """Return (lora_a, lora_b) from the spec's pairs, lora_A (r, in) and lora_B (out, r), one per matrix."""
        a = jnp.stack([pair.lora_A.T for pair in pairs])  # (n, in, r)
        b = jnp.stack([pair.lora_B.T for pair in pairs])  # (n, r, out)
        return self.from_matrices(a, b)

    @partial(jax.jit, static_argnums=0)
    def pairs(self, a: Array, b: Array) -> list[Factors]:
        """Return the spec's pairs from the leaves: the inverse of `leaves`."""
        return [Factors(x.T, y.T) for x, y in zip(*self.matrices(a, b), strict=True)]

    def product(self, a: Array, b: Array) -> Array:
        """Return a b in the kernel's shape and order of axes, in float32 or wider."""
        wide = jnp.promote_types(a.dtype, jnp.float32)
        a, b = self.matrices(a.astype(wide), b.astype(wide))
        delta = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)  # (n, in, out)
        return self._in_kernels_order(delta, self.stack + self.ins + self.outs)

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of DoRA's magnitudes: (stack..., out...)."""
        return (*self._sizes(self.stack), *self._sizes(self.outs))

    def stacked(self, a: Array, b: Array) -> Factors:
        """Return the spec's pairs of all matrices as one, lora_A (n, r, in) and lora_B (n, out, r)."""
        return Factors(*(jnp.swapaxes(matrix, 1, 2) for matrix in self.matrices(a, b)))

    def of_kernel(self, kernel: Array) -> Array:
        """Return the kernel as the spec's matrices, (n, out, in)."""
        matrices = jnp.transpose(kernel, self.stack + self.outs + self.ins)
        return matrices.reshape(self.count, self.out_features, self.in_features)

    def as_kernel(self, matrices: Array) -> Array:
        """Return the inverse of `of_kernel`."""
        return self._in_kernels_order(matrices, self.stack + self.outs + self.ins)

    def added(self, kernel: Array, a: Array, b: Array, scale: float) -> Array:
        """Return kernel + scale * a b, rounded once to the kernel's dtype."""
        delta = scale * self.product(a, b)
        return (kernel.astype(delta.dtype) + delta).astype(kernel.dtype)

    def watched(self, kernel: Array, tap: Tap) -> Array:
        """Return the kernel of a single matrix, whose gradient a tap reads."""
        order = self.outs + self.ins
        matrix = jnp.transpose(kernel, order).reshape(self.out_features, self.in_features)
        return self._in_kernels_order(tap.watch_weight(matrix), order)

    @property
    def orders(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of lora_a and lora_b as stored, by their place in (stack..., in..., r) and (stack..., r, out...)."""
        a, b = (self._cut(tuple(range(len(self.stack + group) + 1))) for group in (self.ins, self.outs))
        return a, b

    def in_front(self, leaf: Array) -> Array:
        """Return a factor with its stacked axes moved to the front, from the places that `lifts` says."""
        order = self._cut(tuple(range(leaf.ndim)))
        return jnp.transpose(leaf, [order.index(axis) for axis in range(leaf.ndim)])

    def _cut(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return an entry per axis of a factor with its stacked axes moved from the front to where `lifts` says."""
        moved = list(axes)
        for depth in reversed(range(len(self.lifts))):  # the innermost first, behind those that are still in front
            axis = self.lifts[depth]
            moved.insert(axis + (depth if axis >= 0 else len(axes)), moved.pop(depth))
        return tuple(moved)

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
        lifts=(0,) * (ndim - ins - outs),
    )


def lifted(inner: Layout, shape: tuple[int, ...], lifts: tuple[int, ...]) -> Layout:
    """Return the layout of a kernel as it is stored, of which a layer sees one matrix of the stack.

    Args:
        inner: layout of the kernel as its layer sees it.
        shape: shape in which it is stored.
        lifts: see `Layout`.

    Raises:
        ValueError: the kernel or its factors cannot be cut as the transformations cut them.
    """
    left, taken = list(range(len(shape))), []
    for axis in lifts:
        taken.append(left.pop(axis))
    if tuple(shape[axis] for axis in left) != inner.shape:
        raise ValueError(f"its kernel is stored as {shape} and called as {inner.shape}: nn.map_variables is not known")
    for depth, axis in enumerate(reversed(lifts)):
        for ndim in (len(inner.a_shape(1)) + depth, len(inner.b_shape(1)) + depth):
            if not -ndim - 1 <= axis <= ndim:
                raise ValueError(
                    f"its kernel {shape} is stacked along axis {axis}, which its factors, of {ndim} axes here, do "
                    "not have: stack along axis 0"
                )
    stack, ins, outs = (tuple(left[axis] for axis in group) for group in (inner.stack, inner.ins, inner.outs))
    return Layout(shape, (*taken, *stack), ins, outs, lifts)


def possible_layouts(shape: tuple[int, ...], inner: Layout) -> list[Layout]:
    """Return the layouts that a stored kernel may have by its sizes, that of axes in front first.

    Args:
        shape: shape in which it is stored.
        inner: layout of the kernel as its layer sees it.

    Raises:
        ValueError: there is none.
    """
    layouts: dict[Any, Layout] = {}
    count = len(shape) - len(inner.shape)
    for taken in combinations(range(len(shape)), max(count, 0)):
        first = [axis - depth for depth, axis in enumerate(taken)]
        last = [axis - len(shape) + depth for depth, axis in enumerate(first)]  # the same axes, from the back
        for lifts in product(*zip(first, last, strict=True)):
            try:
                layout = lifted(inner, shape, lifts)
            except ValueError:
                continue
            layouts.setdefault((layout.stack, *layout.orders), layout)
    if not layouts:
        raise ValueError(f"its kernel must be {inner.shape} with the axes of stacks anywhere between, got {shape}")
    return list(layouts.values())


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
