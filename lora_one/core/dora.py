"""DoRA: the rows of W + s B A get lengths of their own, the magnitudes m. And the magnitudes of LoRA-One's start.

    W' = diag(m / ||W + s B A||) (W + s B A)        with the norm of each row

(DoRA, arXiv 2402.09353, equation 5. In training the norm counts as a constant: no gradient passes through it.)
"""

from .factors import Factors
from .ops import Array, Ops


def magnitudes(ops: Ops, weight: Array, pair: Factors, scaling: float) -> Array:
    """Return the norm of each row of W + s B A, (out,).

    These are the magnitudes with which DoRA computes (W + s B A) x: those of every start. LoRA-One's start is not zero,
    so its norms are not W's. (The authors' code of LoRA-One keeps W's, which undoes the part of the start that changes
    the lengths.)

    Args:
        weight: W, (out, in).
        pair: the factors as the layer has them.
        scaling: s.
    """
    return _row_norms(ops, _adapted(ops, weight, pair, scaling))


def effective_weight(ops: Ops, weight: Array, pair: Factors, scaling: float, m: Array) -> Array:
    """Return the weight that DoRA computes with, (out, in), in float32 or wider.

    Args:
        weight: W, (out, in).
        pair: the factors.
        scaling: s.
        m: the magnitudes, (out,).
    """
    adapted = _adapted(ops, weight, pair, scaling)
    return (ops.at_least_float32(m) / _row_norms(ops, adapted))[..., None] * adapted


def _adapted(ops: Ops, weight: Array, pair: Factors, scaling: float) -> Array:
    a, b = map(ops.at_least_float32, pair)
    return ops.at_least_float32(weight) + scaling * ops.matmul(b, a)


def _row_norms(ops: Ops, x: Array) -> Array:
    return ops.sqrt(ops.sum(x * x, axis=-1))
