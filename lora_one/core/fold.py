"""Gradients of batches, one after the other -> the leading triplets of their sum, in one pass over the data.

Each layer keeps a running SVD of rank k, F = U diag(S) V^T, of the gradients that were added up so far. A batch with
gradient G_b renews it:

    H = F + G_b
    F <- the best rank-k part of Q Q^T H,  Q an orthonormal basis of [H V, H H^T H V]

These are four products with H: a block Krylov method that starts from the V of the batch before. G_b is a matrix, or
the rows dy and x that a backward pass has at hand; H is never formed. The state is k (m + n) numbers per layer, however
many batches there are.

A second pass reads both sides of the sum G at once. LoRA of rank 2k with A = [V^T; 0] and B = [0, U] has B A = 0, and
its gradients are G V and U^T G:

    state = start_fold(ops, omega, out_features, test)
    for gradient in gradients:
        state = fold(ops, state, gradient)
    state = read_both_sides(ops, state, g_v, g_u)  # optional
    spectrum = finish_fold(ops, state, rank)

Processes that saw different batches merge their states with `merge_folds`. `init` does not use this file yet.
"""

from typing import NamedTuple

from .arrays import mean_of_samples, nonzero, smaller, sum_of_squares, thin_svd
from .bases import KrylovBases, completed, extend, fit_block, grow, projected
from .gradient import Gradient, times, transposed_times
from .ops import Array, Ops
from .spectrum import Spectrum, of_descent

PRODUCTS = 4  # with H, per batch; 2 lose a tenth of the energy, 6 gain nothing


class FoldState(NamedTuple):
    """The running SVD of a sum of gradients. For a stack of layers, all arrays have a leading axis."""

    u: Array  # (out, k), orthonormal columns
    s: Array  # (k,), descending
    v: Array  # (in, k), orthonormal columns
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
    u, s = ops.zeros((*batch, out_features, k), like=omega), ops.zeros((*batch, k), like=omega)
    return FoldState(u, s, v, test, ops.zeros((*batch, out_features, test.shape[-1]), like=omega))


def fold(ops: Ops, state: FoldState, gradient: Gradient) -> FoldState:
    """Return the state after a batch.

    Args:
        gradient: what the batch adds to G, (out, in), or the rows that it is a product of; in the dtype of the state.
    """
    us = state.u * state.s[..., None, :]  # (out, k)
    bases = KrylovBases(state.v)
    for number in range(PRODUCTS):
        x = bases.next_probe
        if number % 2 == 0:  # H x, (out, k)
            product = times(ops, gradient, x) + ops.matmul(us, ops.matmul(ops.matrix_transpose(state.v), x))
        else:  # H^T x, (in, k)
            product = transposed_times(ops, gradient, x) + ops.matmul(state.v, ops.matmul(ops.matrix_transpose(us), x))
        bases = extend(ops, bases, product)
    left, right = completed(bases)
    state = _truncated(ops, state, left, projected(ops, bases.coordinates), right)
    return state._replace(tested=state.tested + times(ops, gradient, state.test))


def read_both_sides(ops: Ops, state: FoldState, g_v: Array, g_u: Array) -> FoldState:
    """Return the state after a second pass over the same batches: all of G is known but the block outside U and V.

    Args:
        g_v: G V, (out, k).
        g_u: G^T U, (in, k).
    """
    left, u_gv = _grown(ops, state.u, g_v)  # u_gv: [U Q]^T G V, (k + d, k)
    right, v_gu = _grown(ops, state.v, g_u)  # v_gu: [V P]^T G^T U, (k + d', k)
    k = state.s.shape[-1]
    upper = ops.matrix_transpose(v_gu)  # U^T G [V P], (k, k + d')
    unknown = ops.zeros((*state.s.shape[:-1], u_gv.shape[-2] - k, v_gu.shape[-2] - k), like=g_v)
    lower = ops.concat([u_gv[..., k:, :], unknown], axis=-1)  # (d, k + d')
    return _truncated(ops, state, left, ops.concat([upper, lower], axis=-2), right)


def merge_folds(ops: Ops, state: FoldState, other: FoldState) -> FoldState:
    """Return the state of two processes' batches together: the best rank-k part of the sum of both SVDs."""
    left, in_left = _grown(ops, state.u, other.u)  # (k + d, k)
    right, in_right = _grown(ops, state.v, other.v)
    k = state.s.shape[-1]
    core = ops.matmul(in_left * other.s[..., None, :], ops.matrix_transpose(in_right))  # (k + d, k + d')
    own = ops.eye(k, like=state.s) * state.s[..., None, :]
    padded = ops.concat([own, ops.zeros((*own.shape[:-1], core.shape[-1] - k), like=own)], axis=-1)
    below = ops.zeros((*own.shape[:-2], core.shape[-2] - k, core.shape[-1]), like=own)
    state = _truncated(ops, state, left, core + ops.concat([padded, below], axis=-2), right)
    return state._replace(tested=state.tested + other.tested)


def finish_fold(ops: Ops, state: FoldState, rank: int) -> Spectrum:
    """Return the leading triplets of -G, and estimates of what they leave out.

    The norm of what the SVD lacks comes from the products with `test`. `best_norm` is a cautious estimate: on real
    gradients the energy that the r leading triplets lack was at most an eighth of r S_k^2, where S_k is the smallest
    value that was kept. No single pass can know it; `read_both_sides` finds most of it.
    """
    k = state.s.shape[-1]
    if rank > k:
        raise ValueError(f"rank must be <= {k}, the width of the state, got {rank}")
    unit = nonzero(ops, state.s[..., 0])
    s = state.s / unit[..., None]  # squares must neither overflow nor underflow
    in_test = ops.matmul(ops.matrix_transpose(state.v), state.test) * s[..., None]  # (k, p)
    missed = state.tested / unit[..., None, None] - ops.matmul(state.u, in_test)  # (out, p)
    distances = ops.sum(missed * missed, axis=-2)  # (p,), each an unbiased estimate of the squared norm
    unseen, spread = mean_of_samples(ops, distances)
    norm = ops.sqrt(sum_of_squares(ops, s, axes=1) + unseen)
    held = sum_of_squares(ops, s[..., :rank], axes=1)
    to_come = smaller(ops, unseen, rank / 8.0 * s[..., -1] * s[..., -1])
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


def _truncated(ops: Ops, state: FoldState, left: tuple[Array, ...], core: Array, right: tuple[Array, ...]) -> FoldState:
    """The best rank-k part of left core right^T: blocks (out, d) and (in, d), core (K, K')."""
    k = state.s.shape[-1]
    u, s, vt = thin_svd(ops, core)
    return state._replace(
        u=ops.matmul(ops.concat(left, axis=-1), u[..., :k]),
        s=s[..., :k],
        v=ops.matmul(ops.concat(right, axis=-1), ops.matrix_transpose(vt[..., :k, :])),
    )
