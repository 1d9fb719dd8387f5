"""The norms of a gradient that was seen in part: estimates from the first pass and from the convergence."""

import itertools
from typing import NamedTuple

from .arrays import at_least, diagonal, largest_entry, mean_of_samples, nonzero, smaller, sum_of_squares
from .ops import Array, Ops

MIN_RELATIVE_GAIN = 1e-5  # of the energy: smaller differences between gains are not used as a divisor
MIN_RELATIVE_GAP = 1e-3  # 1 - (S_k / S_i)^2, below which it is no divisor


class ResidualEstimate(NamedTuple):
    """The part of G outside the range of its first sketch, in three fields of `SketchState`."""

    scale: Array  # (), the unit of the next two
    residual: Array  # (), estimate of ||(I - Q_1 Q_1^T) G||_F^2, in units of scale^2
    residual_variance: Array  # (), of that estimate


def estimate_residual(ops: Ops, g_right: Array, mixing: Array) -> ResidualEstimate:
    """Estimate what range(G omega) misses of G, by leaving one column out.

    Column j of omega is independent of the range of all other columns. So the squared distance of G omega_j from that
    range is an unbiased estimate of what a sketch of k - 1 columns misses: slightly too large for one of k columns
    (Epperly and Tropp 2024, arXiv 2207.06342, sec. 2.3).

    Args:
        g_right: G V, (out, k), with omega = V mixing.
        mixing: (k, k).
    """
    y = ops.matmul(g_right, mixing)  # (out, k) = G omega
    scale = largest_entry(ops, y)
    y = y / nonzero(ops, scale)[..., None, None]  # squares must neither overflow nor underflow
    k = y.shape[-1]
    gram = ops.matmul(ops.matrix_transpose(y), y)  # (k, k)
    identity = ops.eye(k, like=y)
    trace = ops.sum(diagonal(ops, gram, identity), axis=-1)
    floor = 4.0 * ops.eps(y) * trace + ops.eps(y)  # keeps the Gram positive definite, also for y = 0
    inverse = ops.cholesky_solve(gram + floor[..., None, None] * identity, identity)
    distance = 1.0 / diagonal(ops, inverse, identity)  # (k,), squared
    return ResidualEstimate(scale, *mean_of_samples(ops, distance))


def estimate_norms(
    ops: Ops, s: Array, earlier: list[Array], second: Array, first_residual: ResidualEstimate, rank: int
) -> dict[str, Array]:
    """Estimate `norm`, `norm_error`, `unseen` and `best_norm` of `Spectrum`.

    Args:
        s: singular values of the projected G, (K,).
        earlier: those values up to three passes ago, the latest last.
        second: the coordinates of Q_1^T G, from the second pass.
        first_residual: from `estimate_residual`.
        rank: the rank of the spectrum.
    """
    # ||G||_F^2 = ||Q_1^T G||_F^2 + residual: the first term is known, and the second was estimated from probes that are
    # independent of the basis it refers to. What later passes found is part of that residual.
    unit, residual, variance = first_residual
    scale = nonzero(ops, unit)
    seen = sum_of_squares(ops, s / scale[..., None], axes=1)
    first = sum_of_squares(ops, second / scale[..., None, None])
    unseen = at_least(ops, first + residual - seen, 0.0)
    norm = ops.sqrt(seen + unseen)
    error = ops.sqrt(variance) / (2.0 * nonzero(ops, norm))  # d sqrt(x) = dx / (2 sqrt(x))
    energies = [sum_of_squares(ops, x[..., :rank] / scale[..., None], axes=1) for x in (*earlier, s)]
    best = ops.sqrt(energies[-1] + _energy_to_come(ops, energies, unseen))
    norms = {"norm": norm, "norm_error": error, "unseen": ops.sqrt(unseen), "best_norm": best}
    return {name: value * unit for name, value in norms.items()}


def _energy_to_come(ops: Ops, energies: list[Array], unseen: Array) -> Array:
    """Estimate the energy that more passes would add to the r leading directions, (), in units of scale^2.

    Let m_i be the energy that was missing i passes ago. Two passes, one on each side, are assumed to divide it by a
    constant factor: m_0 / m_2 = m_1 / m_3. The result m_0 cannot exceed all that is unseen, and equals it after two
    passes.

    Args:
        energies: after the last four passes, the latest last; fewer if there were fewer.
    """
    none = [ops.zeros(unseen.shape, like=unseen)] * (4 - len(energies))  # the energy before the first pass
    earlier, before, last = (at_least(ops, y - x, 0.0) for x, y in itertools.pairwise([*none, *energies]))
    # x / (x + last + before) = (x + last) / (x + last + before + earlier), solved for x
    slower = at_least(ops, earlier - last, 0.0) + MIN_RELATIVE_GAIN * energies[-1]
    return smaller(ops, last * (last + before) / nonzero(ops, slower), unseen)


def energy_by_turning(ops: Ops, s: Array, turn: Array, rank: int) -> Array:
    """Estimate the energy that more products with G would add to the r leading triplets, (), in the unit of s^2.

    Triplet i gains about turn_i S_k^2 / (1 - (S_k / S_i)^2): S_k stands for what lies outside, and the quotient sums
    what the products after the next would gain.

    Args:
        s: the singular values that were found, descending, (k,), k > rank.
        turn: the share of each triplet in the newest directions, by which the next may turn it again, (k,) or (r,).
    """
    squares = s * s
    outside, leading = squares[..., -1:], squares[..., :rank]
    gap = at_least(ops, 1.0 - outside / nonzero(ops, leading), MIN_RELATIVE_GAP)  # (r,)
    return ops.sum(turn[..., :rank] * outside / gap, axis=-1)
