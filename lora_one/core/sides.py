"""Both sides of a gradient in one pass: G V and G^T U from LoRA's own gradients.

Give a layer y = W x + B A x the factors A = [V^T; 0] and B = [0, U]. Their product is zero, so the model computes the
same function, and with G = dL/dW, (out, in), at scale 1

    the gradient of B is [G V, 0]
    the gradient of A is [0; U^T G]

No gradient of W is ever formed, so W may be quantised or sharded. The products are linear in G: gradients of batches,
of calls of the same layer and of processes add up, whoever adds them.
"""

from typing import NamedTuple

from .factors import Factors
from .gradient import Gradient, times, transposed_times
from .ops import Array, Ops


class Sides(NamedTuple):
    """The directions in which to read a gradient G, (out, in). For a stack of layers, with a leading axis."""

    right: Array  # (in, p)
    left: Array  # (out, q)


class Products(NamedTuple):
    """What a gradient G, (out, in), gives in these directions."""

    g_right: Array  # (out, p), G right
    g_left: Array  # (in, q), G^T left


def products_with(ops: Ops, gradient: Gradient, sides: Sides) -> Products:
    """Return the products of a gradient that is at hand, as a matrix or as rows."""
    return Products(times(ops, gradient, sides.right), transposed_times(ops, gradient, sides.left))


def whole_sides(ops: Ops, out_features: int, in_features: int, like: Array) -> Sides:
    """Return all directions of the smaller side of a gradient: they read it whole."""
    if in_features <= out_features:
        return Sides(ops.eye(in_features, like), ops.zeros((out_features, 0), like))
    return Sides(ops.zeros((in_features, 0), like), ops.eye(out_features, like))


def whole_gradient(ops: Ops, products: Products) -> Array:
    """Return the gradient, (out, in), that was read in the directions of `whole_sides`."""
    g_right, g_left = products
    return g_right if g_right.shape[-1] else ops.matrix_transpose(g_left)


def sides_as_factors(ops: Ops, sides: Sides) -> Factors:
    """Return the LoRA pair of rank p + q to install: lora_A (p + q, in), lora_B (out, p + q), product zero."""
    right, left = sides
    p, q = right.shape[-1], left.shape[-1]
    no_right = ops.zeros((*right.shape[:-1], q), like=right)
    no_left = ops.zeros((*left.shape[:-1], p), like=left)
    lora_A = ops.matrix_transpose(ops.concat([right, no_right], axis=-1))
    return Factors(lora_A, ops.concat([no_left, left], axis=-1))


def products_of(ops: Ops, gradients: Factors, p: int) -> Products:
    """Return the products from the gradients of that pair, of which p columns were right."""
    return Products(gradients.lora_B[..., :p], ops.matrix_transpose(gradients.lora_A)[..., p:])
