"""Gradients of batches, one after the other -> the leading triplets of their sum, in one pass over the data.

Each layer keeps a running SVD of rank k, F = U diag(S) V^T, of the gradients that were added up so far. A batch with
gradient G_b renews it:

    H = F + G_b
    F <- the best rank-k part of Q Q^T H,  Q an orthonormal basis of [H V, H H^T H V]

These are four products with H: a block Krylov method that starts from the V of the batch before. G_b is a matrix, or
the rows dy and x that a backward pass has at hand; H is never formed. The state is k (m + n) numbers per layer, however
many batches there are.

    state = start_fold(ops, omega, out_features, test)
    for gradient in gradients:
        state = fold(ops, state, gradient)
    state = of_mean(ops, state, len(gradients))
    spectrum = finish_fold(ops, state, rank)

Another pass reads both sides of the whole G, `read_both_sides`, with the products that `core.sides` takes from LoRA's
own gradients. Where no code sees dy and x, such passes are all there is: the first has random sides, and `aim` makes
the bases of the second from what it read. Processes that saw different batches merge their states by `merge_all`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .arrays import mean_of_samples, nonzero, smaller, sum_of_squares
from .bases import KrylovBases, completed, extend, projected
from .estimates import energy_by_turning
from .gradient import Gradient, times, transposed_times
from .ops import Array, Ops
from .sides import Products
from .spectrum import Spectrum, fully_seen, of_descent
from .triplets import Triplets, add_both_sides, outside, sum_of, truncated

PRODUCTS = 4  # with H, per batch; 2 lose a tenth of the energy, 6 gain nothing
TEST_COLUMNS = 8  # Gaussian, to measure the norm of G
TURN_OF_A_FOLD = 1.0 / 8.0  # measured on gradients of a pretrained encoder: an upper end, at ranks of 4 to 64


class FoldState(NamedTuple):
    """The running SVD of a sum of gradients. For a stack of layers, all arrays have a leading axis."""

    u: Array  # (out, k), orthonormal columns
    s: Array  # (k,), descending
    v: Array  # (in, k), orthonormal columns
    turn: Array  # (k,), by how much the last renewal turned u_i and v_i: the sum of sin^2; for a fold, a constant
    test: Array  # (in, p), Gaussian and not part of the SVD: its products say how large G is
    tested: Array  # (out, p), G test


def start_fold(ops: Ops, omega: Array, out_features: int, test: Array) -> FoldState:
    """Return the state before the first batch.

    Args:
        omega: Gaussian test matrix, (in, k), float32 or wider, k <= min(out, in); or a stack of them.
        out_features: rows of G.
        test: Gaussian matrix, (in, p), independent of omega; or a stack of them.
    """
    in_features, k = omega.shape[-2:]
    if k > min(in_features, out_features):
        raise ValueError(f"width must be <= min(out, in) = {min(in_features, out_features)}, got {k}")
    v, _ = ops.qr(omega)  # (in, k)
    batch = omega.shape[:-2]
    u, tested = (ops.zeros((*batch, out_features, n), like=omega) for n in (k, test.shape[-1]))
    s, turn = (ops.zeros((*batch, k), like=omega) for _ in range(2))
    return FoldState(u, s, v, turn, test, tested)


def fold(ops: Ops, state: FoldState, gradient: Gradient) -> FoldState:
    """Return the state after a batch.

    Args:
        gradient: what the batch adds to G, (out, in), or the rows that it is a product of; in the dtype of the state.
    """
    us = state.u * state.s[..., None, :]  # (out, k)
    k = us.shape[-1]
    bases = KrylovBases(state.v)
    # One product reads the rows for both: as fast as for V alone.
    first = times(ops, gradient, ops.concat([state.v, state.test], axis=-1))  # (out, k + p)
    bases = extend(ops, bases, first[..., :k] + us)
    for number in range(1, PRODUCTS):
        x = bases.next_probe
        if number % 2 == 0:  # H x, (out, k)
            product = times(ops, gradient, x) + ops.matmul(us, ops.matmul(ops.matrix_transpose(state.v), x))
        else:  # H^T x, (in, k)
            product = transposed_times(ops, gradient, x) + ops.matmul(state.v, ops.matmul(ops.matrix_transpose(us), x))
        bases = extend(ops, bases, product)
    left, right = completed(bases)
    tested = state.tested + first[..., k:]
    return _folded(ops, state, truncated(ops, left, projected(ops, bases), right), tested)


def of_mean(ops: Ops, state: FoldState, count: int) -> FoldState:
    """Return the state of a sum of `count` gradients, divided by that number."""
    return state._replace(s=state.s / count, tested=state.tested / count)


def aim(ops: Ops, state: FoldState, products: Products) -> FoldState:
    """Return the state whose bases span what products with the bases so far gave. Of G it knows nothing in them yet.

    Args:
        products: with right = [V | test], (in, k + p), and left = U.
    """
    k = state.s.shape[-1]
    u, _ = ops.qr(products.g_right[..., :k])
    v, _ = ops.qr(products.g_left)
    return state._replace(u=u, s=ops.zeros(state.s.shape, like=u), v=v, tested=products.g_right[..., k:])


def read_both_sides(ops: Ops, state: FoldState, products: Products) -> FoldState:
    """Return the state after another pass over all batches: all of G is known but the block outside U and V.

    Args:
        products: with right = V and left = U.
    """
    nothing = Triplets(state.u, ops.zeros(state.s.shape, like=state.s), state.v)
    after = add_both_sides(ops, nothing, products)
    turn = outside(ops, after.u, state.u) + outside(ops, after.v, state.v)
    return state._replace(**after._asdict(), turn=turn)


def merge_folds(ops: Ops, state: FoldState, other: FoldState) -> FoldState:
    """Return the state of two processes' batches together: the best rank-k part of the sum of both SVDs."""
    both = sum_of(ops, Triplets(*state[:3]), Triplets(*other[:3]))
    return _folded(ops, state, both, state.tested + other.tested)


def merge_all(ops: Ops, states: Sequence[FoldState]) -> FoldState:
    """Return the state of all processes' batches together. They merge in pairs, then the pairs in pairs."""
    while len(states) > 1:
        pairs = zip(states[::2], states[1::2], strict=False)
        unpaired = states[-1:] if len(states) % 2 else ()
        states = [*(merge_folds(ops, *pair) for pair in pairs), *unpaired]
    return states[0]


def finish_fold(ops: Ops, state: FoldState, rank: int) -> Spectrum:
    """Return the leading triplets of -G, and estimates of what they leave out.

    The norm comes from the products with `test`, and is exact where k spans the smaller side of G. `best_norm` is an
    estimate by how far the triplets may still turn.
    """
    k = state.s.shape[-1]
    if rank > k:
        raise ValueError(f"rank must be <= {k}, the width of the state, got {rank}")
    if k == min(state.u.shape[-2], state.v.shape[-2]):
        return of_descent(ops, fully_seen(ops, state.u, state.s, ops.matrix_transpose(state.v), rank))
    unit = nonzero(ops, state.s[..., 0])
    s = state.s / unit[..., None]  # squares must neither overflow nor underflow
    in_test = ops.matmul(ops.matrix_transpose(state.v), state.test) * s[..., None]  # (k, p)
    missed = state.tested / unit[..., None, None] - ops.matmul(state.u, in_test)  # (out, p)
    distances = ops.sum(missed * missed, axis=-2)  # (p,), each an unbiased estimate of the squared norm
    unseen, spread = mean_of_samples(ops, distances)
    norm = ops.sqrt(sum_of_squares(ops, s, axes=1) + unseen)
    held = sum_of_squares(ops, s[..., :rank], axes=1)
    to_come = smaller(ops, unseen, energy_by_turning(ops, s, state.turn, rank))
    return of_descent(
        ops,
        Spectrum(
            u=state.u[..., :rank],
            s=state.s[..., :rank],
            vt=ops.matrix_transpose(state.v[..., :rank]),
            norm=norm * unit,
            norm_error=ops.sqrt(spread) / (2.0 * nonzero(ops, norm)) * unit,  # d sqrt(x) = dx / (2 sqrt(x))
            unseen=ops.sqrt(unseen) * unit,
            best_norm=ops.sqrt(held + to_come) * unit,
        ),
    )


def _folded(ops: Ops, state: FoldState, triplets: Triplets, tested: Array) -> FoldState:
    turn = ops.zeros(state.s.shape, like=triplets.s) + TURN_OF_A_FOLD
    return state._replace(**triplets._asdict(), turn=turn, tested=tested)
