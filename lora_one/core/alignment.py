"""How well two subspaces agree, and how much of a gradient a set of directions holds."""

from .factors import Factors
from .ops import Array, Ops


def principal_cosines(ops: Ops, x: Array, y: Array) -> Array:
    """Cosines of the principal angles between the column spaces of x (n, p) and y (n, q): (min(p, q),), descending.

    1 where they share a direction, 0 where one is orthogonal to the other (Bjorck and Golub 1973).

    Raises nothing for rank-deficient input, but then the missing directions are arbitrary.
    """
    qx, _ = ops.qr(x)
    qy, _ = ops.qr(y)
    return ops.svdvals(ops.matmul(ops.matrix_transpose(qx), qy))


def principal_sines(ops: Ops, x: Array, y: Array) -> Array:
    """Sines of the principal angles, (min(p, q),), descending: the largest angle first.

    Accurate where the angles are small, as cosines are not. The first is the paper's alignment measure
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
    """Share of ||G||_F^2 that lies in the row space of lora_A and the column space of lora_B: (), in [0, 1].

    Divide by the same for the exact truncated SVD to get the share of the best rank-r energy.
    """
    scale = ops.max(abs(gradient))
    g = gradient / (scale + ops.astype(scale == 0, scale.dtype))
    qb, _ = ops.qr(factors.lora_B)  # (out, r)
    qa, _ = ops.qr(ops.matrix_transpose(factors.lora_A))  # (in, r)
    core = ops.matmul(ops.matrix_transpose(qb), ops.matmul(g, qa))  # (r, r)
    total = ops.sum(g * g)
    return ops.sum(core * core) / (total + ops.astype(total == 0, total.dtype))
