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

from .arrays import diagonal, mean_of_samples, nonzero, smaller, split_by_projection, sum_of_squares, thin_svd
from .bases import KrylovBases, completed, extend, fit_block, grow, projected
from .estimates import energy_by_turning
from .gradient import Gradient, times, transposed_times
from .ops import Array, Ops
from .sides import Products
from .spectrum import Spectrum, fully_seen, of_descent

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
    return _truncated(ops, state, left, projected(ops, bases), right)._replace(tested=tested)


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
    left, u_gv = _grown(ops, state.u, products.g_right)  # u_gv: [U Q]^T G V, (k + d, k)
    right, v_gu = _grown(ops, state.v, products.g_left)  # v_gu: [V P]^T G^T U, (k + d', k)
    k = state.s.shape[-1]
    upper = ops.matrix_transpose(v_gu)  # U^T G [V P], (k, k + d')
    unknown = ops.zeros((*state.s.shape[:-1], u_gv.shape[-2] - k, v_gu.shape[-2] - k), like=u_gv)
    lower = ops.concat([u_gv[..., k:, :], unknown], axis=-1)  # (d, k + d')
    after = _truncated(ops, state, left, ops.concat([upper, lower], axis=-2), right)
    return after._replace(turn=_outside(ops, after.u, state.u) + _outside(ops, after.v, state.v))


def merge_folds(ops: Ops, state: FoldState, other: FoldState) -> FoldState:
    """Return the state of two processes' batches together: the best rank-k part of the sum of both SVDs."""
    left, in_left = _grown(ops, state.u, other.u)  # (k + d, k)
    right, in_right = _grown(ops, state.v, other.v)
    k = state.s.shape[-1]
    core = ops.matmul(in_left * other.s[..., None, :], ops.matrix_transpose(in_right))  # (k + d, k + d')
    own = ops.eye(k, like=state.s) * state.s[..., None, :]
    padded = ops.concat([own, ops.zeros((*own.shape[:-1], core.shape[-1] - k), like=own)], axis=-1)
    below = ops.zeros((*own.shape[:-2], core.shape[-2] - k, core.shape[-1]), like=own)
    tested = state.tested + other.tested
    return _truncated(ops, state, left, core + ops.concat([padded, below], axis=-2), right)._replace(tested=tested)


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


def _grown(ops: Ops, basis: Array, x: Array) -> tuple[tuple[Array, ...], Array]:
    """A basis, (rows, k), with the directions that x, (rows, k), adds; and the coordinates of x in both, (k + d, k)."""
    block, coordinates = grow(ops, (basis,), x, x.shape[-1])
    return (basis, fit_block(block, (basis,))), coordinates


def _outside(ops: Ops, x: Array, basis: Array) -> Array:
    """The squared distance of each column of x, (rows, k), from the span of a basis, (rows, k): (k,)."""
    remainder, _ = split_by_projection(ops, x, basis)
    return ops.sum(remainder * remainder, axis=-2)


def _truncated(ops: Ops, state: FoldState, left: tuple[Array, ...], core: Array, right: tuple[Array, ...]) -> FoldState:
    """The best rank-k part of left core right^T: blocks (out, d) and (in, d), core (K, K'), K and K' >= k."""
    k = state.s.shape[-1]
    u, s, vt = thin_svd(ops, core)
    return state._replace(
        u=_orthonormal(ops, ops.matmul(ops.concat(left, axis=-1), u[..., :k])),
        s=s[..., :k],
        v=_orthonormal(ops, ops.matmul(ops.concat(right, axis=-1), ops.matrix_transpose(vt[..., :k, :]))),
        turn=ops.zeros(state.s.shape, like=s) + TURN_OF_A_FOLD,
    )


def _orthonormal(ops: Ops, x: Array) -> Array:
    """Return x, (rows, k), with its last columns made orthonormal to the others, where they are not.

    The bases have zero columns where the space is exhausted, and the vectors of singular values that are zero may mix
    them with the others. If such vectors were probed next, the SVD would count energy twice.
    """
    q, r = ops.qr(x)
    positive = ops.astype(diagonal(ops, r, ops.eye(x.shape[-1], like=r)) >= 0, r.dtype)  # (k,), 1 or 0
    return q * (2.0 * positive - 1.0)[..., None, :]
