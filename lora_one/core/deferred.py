"""LoRA-One's start, made out of the first gradients of a training that begins as plain LoRA's does: without data.

With scale c and G_t = dL/dW, (out, in), of step t, the gradients of a LoRA pair are

    gB = c G_t A^T        gA = c B^T G_t

so a step reads G_t in whatever directions the factors have. Plain LoRA's B is zero and its A random: step 1 reads
G_1 V, with V the directions of A's rows. LoRA-One's start of what this says, A = -diag(a) V^T and B = U diag(b), is set
at once. From then on each step reads both sides, G_t V and U^T G_t. They are added to a running SVD of rank r, whose
singular vectors make the next factors. After a few steps AdamW takes over.

    state = start_state(ops, pair)
    for gradient in gradients:  # of `pair`, step by step
        pair, state = start_step(ops, pair, gradient, state, gamma)

Only directions and ratios of singular values are used, so a common factor of the gradients (loss scale, accumulation,
c itself) cancels. The vectors are in the factors, so the state is r + 1 numbers a pair. Pairs of equal shapes may go
through together, with a leading axis.
"""

import math
from typing import NamedTuple

from .arrays import diagonal, largest_entry, nonzero, sum_of_squares
from .factors import BALANCE, Factors, lengths, normalized_factors
from .ops import Array, Ops
from .sides import Products
from .spectrum import fully_seen, of_descent
from .triplets import Triplets, add_both_sides, orthonormal

LEAST_STEPS, MOST_STEPS = 6, 16  # of start_steps="auto": between them `settled` decides
NOISE = 0.125  # energy of the noise in the sum of gradients, over that of the sum itself, that "auto" accepts
LEAST_LENGTH = 1e-3  # of a vector of B over the first one: a shorter one keeps this, so that the next step can read it


class StartState(NamedTuple):
    """What the steps so far told of a pair's gradients, beside the directions that the factors hold."""

    s: Array  # (r,), the leading singular values of their sum, descending; zeros before the first
    agreement: Array  # (), cosine of the last gradient with the sum before it, inside of U and V


def start_state(ops: Ops, pair: Factors) -> StartState:
    """Return the state of a pair with B = 0, before the first gradient."""
    *stack, rank, _ = pair.lora_A.shape
    like = ops.at_least_float32(pair.lora_A)
    return StartState(ops.zeros((*stack, rank), like=like), ops.zeros(tuple(stack), like=like))


def start_step(
    ops: Ops, pair: Factors, gradient: Factors, state: StartState, gamma: float, balance: float = BALANCE
) -> tuple[Factors, StartState]:
    """Return the pair and the state after a gradient.

    A gradient that is zero, or not finite, changes nothing.

    Args:
        pair: the factors as the model used them: plain LoRA's, or those that the step before returned.
        gradient: of both factors.
        state: of `start_state`, or of the step before.
        gamma, balance: of `normalized_factors`.

    Returns:
        The pair, in the dtypes of the old one; and the state.
    """
    a, b, g_a, g_b = map(ops.at_least_float32, (*pair, *gradient))
    read = readable(ops, gradient)  # ()
    g_a, g_b = (_where(ops, read, g, ops.zeros((), like=g)) for g in (g_a, g_b))
    started = state.s[..., 0] > 0  # ()
    rows, columns = (length / math.sqrt(gamma) for length in lengths(_ratios(ops, state.s, balance), balance))  # (r,)
    length = ops.sqrt(sum_of_squares(ops, a) / a.shape[-2])[..., None]  # of A's rows, (1,)
    right = _where(ops, started, -1.0 / rows, 1.0 / nonzero(ops, length), axes=1)  # (r,): V = A^T diag(right)
    v, g_v = _exactly_read(ops, ops.matrix_transpose(a) * right[..., None, :], g_b * right[..., None, :])
    left, g_left = b / columns[..., None, :], ops.matrix_transpose(g_a) / columns[..., None, :]
    # B = 0 has read nothing. Then U is made of G V, and all that is known of G^T U is what G V says.
    u, g_u = _exactly_read(ops, _where(ops, started, left, g_v), g_left)
    within = ops.matmul(ops.matrix_transpose(u), g_v)  # U^T G V, (r, r)
    g_u = _where(ops, started, g_u, ops.matmul(v, ops.matrix_transpose(within)))  # (in, r)
    # Decompositions see numbers near 1, so that another common factor does not even change their rounding.
    unit = nonzero(ops, largest_entry(ops, g_v) + largest_entry(ops, g_u) + state.s[..., 0])[..., None]  # (1,)
    products = Products(g_v / unit[..., None], g_u / unit[..., None])
    sum_of_all = add_both_sides(ops, Triplets(u, state.s / unit, v), products)
    factors = _start(ops, sum_of_all, gamma, balance)
    return (
        Factors(*(ops.astype(_where(ops, read, new, old), old.dtype) for new, old in zip(factors, pair, strict=True))),
        StartState(
            _where(ops, read, sum_of_all.s * unit, state.s, axes=1),
            _where(ops, read, _cosine(ops, within, state.s), state.agreement, axes=0),
        ),
    )


def readable(ops: Ops, gradient: Factors) -> Array:
    """Return whether a pair's gradient says anything: neither zero nor with entries that are not finite, ()."""
    g_a, g_b = map(ops.at_least_float32, gradient)
    return _finite(ops, g_a) & _finite(ops, g_b) & (largest_entry(ops, g_a) + largest_entry(ops, g_b) > 0)


def settled(ops: Ops, steps: Array, states: list[StartState]) -> Array:
    """Return whether the sum of gradients holds little enough noise for AdamW to take over: a boolean, ().

    A gradient that agrees with the sum by a cosine of a has 1 / a^2 - 1 times as much energy in noise as in what the
    sum holds. In a sum of n it is that over n.

    Args:
        steps: n, an array ().
        states: of all pairs; a pair that no gradient reached does not count. They may be stacks.
    """
    agreement, count = (ops.zeros((), like=states[0].s) for _ in range(2))
    for s, of_pair in states:
        started = ops.astype(s[..., 0] > 0, s.dtype)
        agreement = agreement + ops.sum(of_pair * started)
        count = count + ops.sum(started)
    mean = agreement / nonzero(ops, count)
    signal = mean * abs(mean)  # a sum that the gradient contradicts is no signal
    return NOISE * steps * signal >= 1.0 - signal


def _exactly_read(ops: Ops, x: Array, product: Array) -> tuple[Array, Array]:
    """Return an orthonormal basis of the columns x, (columns, r), and G times the basis from `product`, G x.

    The columns are nearly orthonormal: those of narrow factors are rounded, and plain LoRA's are random.
    """
    basis = orthonormal(ops, x)
    transposed = ops.matrix_transpose(x)
    turned = ops.cholesky_solve(ops.matmul(transposed, x), ops.matmul(transposed, basis))  # (r, r)
    exact = ops.matmul(product, turned)
    return basis, ops.where(ops.isfinite(exact), exact, product)  # NaN where columns depend on each other


def _start(ops: Ops, triplets: Triplets, gamma: float, balance: float) -> Factors:
    u, s, v = triplets
    rank = s.shape[-1]
    spectrum = of_descent(ops, fully_seen(ops, u, _ratios(ops, s, balance), ops.matrix_transpose(v), rank))
    return normalized_factors(ops, spectrum, gamma, balance)


def _ratios(ops: Ops, s: Array, balance: float) -> Array:
    """Return S_i / S_1, (r,), none of them too small to be read again."""
    ratios, least = s / nonzero(ops, s[..., :1]), LEAST_LENGTH ** (1.0 / (1.0 - balance))
    return ops.where(ratios > least, ratios, ops.zeros((), like=s) + least)


def _cosine(ops: Ops, within: Array, s: Array) -> Array:
    """Return the cosine of U^T G V, (r, r), and diag(S), (); 0 before the first gradient."""
    g = within / nonzero(ops, largest_entry(ops, within))[..., None, None]  # squares must not overflow
    s = s / nonzero(ops, s[..., :1])
    lengths = ops.sqrt(sum_of_squares(ops, g) * sum_of_squares(ops, s, axes=1))
    return ops.sum(diagonal(ops, g, ops.eye(s.shape[-1], like=g)) * s, axis=-1) / nonzero(ops, lengths)


def _finite(ops: Ops, x: Array) -> Array:
    """Return whether all entries are finite: a boolean, ()."""
    return largest_entry(ops, 1.0 - ops.astype(ops.isfinite(x), x.dtype)) == 0


def _where(ops: Ops, condition: Array, x: Array, y: Array, axes: int = 2) -> Array:
    """Choose x or y by a condition, (), for arrays of so many axes."""
    for _ in range(axes):
        condition = condition[..., None]
    return ops.where(condition, x, y)
