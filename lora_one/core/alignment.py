"""How well two subspaces agree, and how much of a gradient a LoRA pair can express."""

from .arrays import nonzero
from .factors import Factors
from .ops import Array, Ops


def principal_cosines(ops: Ops, x: Array, y: Array) -> Array:
    """Cosines of the principal angles between the column spaces of x (n, p) and y (n, q): (min(p, q),), descending.

    1 where the spaces share a direction, 0 where a direction of one is orthogonal to the other (Bjorck and Golub 1973).
    Rank-deficient input raises nothing, but then the missing directions are arbitrary.
    """
    qx, _ = ops.qr(x)
    qy, _ = ops.qr(y)
    return ops.svdvals(ops.matmul(ops.matrix_transpose(qx), qy))


def principal_sines(ops: Ops, x: Array, y: Array) -> Array:
    """Sines of the principal angles, (min(p, q),), descending: the largest angle first.

    They are accurate for small angles, where cosines are not. The first one is the paper's alignment measure
    ||U_perp^T U_t|| (arXiv 2502.01235, Theorem 3.2).
    """
    if x.shape[1] < y.shape[1]:
        x, y = y, x
    qx, _ = ops.qr(x)
    qy, _ = ops.qr(y)
    outside = qy - ops.matmul(qx, ops.matmul(ops.matrix_transpose(qx), qy))  # (n, q)
    _, r = ops.qr(outside)
    return ops.svdvals(r)


def captured_energy(ops: Ops, gradient: Array, factors: Factors) -> Array:
    """The share of ||G||_F^2 in the row space of lora_A and the column space of lora_B: (), in [0, 1].

    Divide it by the same share for the exact truncated SVD to get the share of the best rank-r energy.
    """
    scale = ops.max(abs(gradient))
    g = gradient / nonzero(ops, scale)
    qb, _ = ops.qr(factors.lora_B)  # (out, r)
    qa, _ = ops.qr(ops.matrix_transpose(factors.lora_A))  # (in, r)
    core = ops.matmul(ops.matrix_transpose(qb), ops.matmul(g, qa))  # (r, r)
    total = ops.sum(g * g)
    return ops.sum(core * core) / nonzero(ops, total)
