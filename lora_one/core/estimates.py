"""What triplets that were found by products with G lack of the best ones."""

from .arrays import at_least, nonzero
from .ops import Array, Ops

MIN_RELATIVE_GAP = 1e-3  # 1 - (S_k / S_i)^2, below which it is no divisor


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
