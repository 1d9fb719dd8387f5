"""Gradient -> truncated SVD by a sketch that LoRA's own gradients supply.

The sketch rests on two identities. Give a layer y = W x + B A x factors whose product is zero, so that the model still
computes the same function, and let G = dL/dW, (out, in). Then

    A = V^T, B = 0    the gradient of B is G V
    A = 0,   B = Q    the gradient of A is Q^T G

which are the two products that a randomised SVD needs (Halko, Martinsson and Tropp 2011, arXiv 0909.4061). No gradient
of W is ever formed, so W may be quantised or sharded.

Here it is a small state machine, one state a layer. A backend installs what `probe` names, runs a backward pass, and
hands the gradient to `advance`; from two passes on, `finish` may be called at any time:

    state = start(ops, omega, out_features)
    for _ in range(passes):
        state = advance(ops, state, gradient_of(probe(state)))
    spectrum = finish(ops, state, rank)

Every pass probes only directions that no earlier pass has seen, so the bases of all passes together span a block Krylov
space (Musco and Musco 2015, arXiv 1504.05477), in the numerically stable form: block Golub-Kahan bidiagonalisation with
full reorthogonalisation.

Layers that are alike may go through it together, as arrays with one more leading axis: a GPU waits for launches.
"""

import itertools
from typing import Literal, NamedTuple

from .arrays import (
    at_least_zero,
    diagonal,
    largest_entry,
    nonzero,
    smaller,
    split_by_projection,
    sum_of_squares,
    thin_svd,
)
from .ops import Array, Ops, as_one_program
from .spectrum import Spectrum, fully_seen, of_descent

REORTHOGONALIZE_THRESHOLD = 4  # one in so many directions of the space is known
MIN_RELATIVE_GAIN = 1e-5  # of the energy: gains that are so small, or so much alike, are not divided by each other


Side = Literal["A", "B"]


class Probe(NamedTuple):
    """The LoRA factor to install, at scale 1, for one pass.

    The other factor is zero, and its gradient is what `advance` asks for.
    """

    side: Side
    factor: Array  # lora_A, (k, in), or lora_B, (out, k)


class SketchState(NamedTuple):
    """All that the passes so far have learnt about G: bases, and what G is in them.

    Blocks are (., d), d <= k, and orthonormal taken together on each side. What a pass yields lies in the span of the
    blocks known by then and of the one that it adds, so that the coordinates are all that is kept of it. Shapes are a
    layer's: of a stack of layers all have a leading axis.
    """

    next_probe: Array  # (in, k) before odd passes, (out, k) before even ones
    right: tuple[Array, ...]  # blocks V_j, (in, d)
    left: tuple[Array, ...]  # blocks Q_j, (out, d)
    # Of pass 1, 3, ...: [Q_1 ... Q_j]^T G V_j, (j k, d); of pass 2, 4, ...: [V_1 ... V_{j+1}]^T G^T Q_j, (j k + k, d).
    coordinates: tuple[Array, ...]
    mixing: Array  # (k, k): omega = right[0] @ mixing
    scale: Array  # (), the unit of the next two
    residual: Array  # (), estimate of ||(I - Q_1 Q_1^T) G||_F^2
    residual_variance: Array  # (), of that estimate

    @property
    def passes(self) -> int:
        """How many gradients the state has taken in."""
        return len(self.coordinates)


def start(ops: Ops, omega: Array, out_features: int) -> SketchState:
    """The state before the first pass.

    Args:
        omega: Gaussian test matrix, (in, k), float32 or wider, k <= min(out, in): see `draw_omega`; or a stack of them.
        out_features: rows of G.
    """
    in_features, k = omega.shape[-2:]
    if k > min(in_features, out_features):
        raise ValueError(f"sketch width must be <= min(out, in) = {min(in_features, out_features)}, got {k}")
    # Probing with orthonormal columns instead of omega itself changes no subspace, and the products can then be
    # projected on as they are when the passes stop after an odd one.
    v, mixing = ops.qr(omega)  # (in, k), (k, k)
    zero = ops.zeros(omega.shape[:-2], like=omega)
    return SketchState(v, (), (), (), mixing, zero, zero, zero)


def probe(ops: Ops, state: SketchState) -> Probe:
    """The factors whose gradient `advance` wants next."""
    if state.passes % 2 == 0:
        return Probe("A", ops.matrix_transpose(state.next_probe))
    return Probe("B", state.next_probe)


def advance(ops: Ops, state: SketchState, gradient: Array) -> SketchState:
    """The state after a pass.

    Args:
        gradient: with respect to the factor that `probe` left out: lora_B's, (out, k), after a pass with lora_A given;
            lora_A's, (k, in), after one with lora_B. In the dtype of the state.
    """
    if state.passes % 2 == 0:
        if state.passes == 0:
            residual = as_one_program(ops, _estimate_residual)(gradient, state.mixing)
            state = state._replace(scale=residual[0], residual=residual[1], residual_variance=residual[2])
        probed = _fit_block(state.next_probe, state.right)
        x, known = gradient[..., : probed.shape[-1]], state.left  # (out, d) = G V
        state = state._replace(right=(*state.right, probed))
    else:
        probed = _fit_block(state.next_probe, state.left)
        x, known = ops.matrix_transpose(gradient[..., : probed.shape[-1], :]), state.right  # (in, d) = G^T Q
        state = state._replace(left=(*state.left, probed))
    rest, coordinates = _project_out(ops, x, known)  # (., d), each (d, d)
    block = _new_directions(ops, rest, known, state.next_probe.shape[-1])
    coordinates.append(ops.matmul(ops.matrix_transpose(_fit_block(block, known)), x))
    return state._replace(next_probe=block, coordinates=(*state.coordinates, ops.concat(coordinates, axis=-2)))


def advance_on(ops: Ops, state: SketchState, gradient: Array) -> SketchState:
    """The state after a pass over a G that is there as a matrix, (out, in), in the place of a backward pass."""
    side, factor = probe(ops, state)
    if side == "A":
        return advance(ops, state, ops.matmul(gradient, ops.matrix_transpose(factor)))  # (out, k) = G V
    return advance(ops, state, ops.matmul(ops.matrix_transpose(factor), gradient))  # (k, in) = Q^T G


def finish(ops: Ops, state: SketchState, rank: int) -> Spectrum:
    """The leading triplets of -G projected on all directions probed so far (block Krylov), after >= 2 passes."""
    if state.passes < 2:
        raise ValueError(f"a sketch needs at least 2 passes, got {state.passes}")
    left, right = state.left, state.right
    if state.passes % 2 == 0:
        right = (*right, _fit_block(state.next_probe, right))
    else:
        left = (*left, _fit_block(state.next_probe, left))
    directions = min(_columns(left), _columns(right))
    if rank > directions:
        raise ValueError(f"rank must be <= {directions}, the directions probed, got {rank}")
    whole = _columns(state.left) == left[0].shape[-2] or _columns(state.right) == right[0].shape[-2]
    residual = (state.scale, state.residual, state.residual_variance)
    in_bases = as_one_program(ops, _spectrum_in_bases, ("rank", "whole"))
    inside = in_bases(state.coordinates, residual, rank=rank, whole=whole)
    return as_one_program(ops, _to_full_space)(inside, left, right)


def _spectrum_in_bases(
    ops: Ops,
    coordinates: tuple[Array, ...],
    of_residual: tuple[Array, Array, Array],
    rank: int,
    whole: bool,
) -> Spectrum:
    """The leading triplets of G in the bases: of `Spectrum`, but u is (K, r), vt is (r, K), and signs are not set.

    Args:
        coordinates: of the state.
        of_residual: (scale, residual, residual_variance) of the state.
        whole: whether one of the bases spans its space, so that all of G was seen.
    """
    passes = len(coordinates)
    u, s, vt = thin_svd(ops, _projected(ops, coordinates, passes))
    if whole:
        return fully_seen(ops, u, s, vt, rank)
    earlier = range(max(1, passes - 3), passes)
    energies = [ops.svdvals(_projected(ops, coordinates, number)) for number in earlier]
    norms = _norms(ops, s, energies, coordinates[1], of_residual, rank)
    return Spectrum(u[..., :rank], s[..., :rank], vt[..., :rank, :], **norms)


def _to_full_space(ops: Ops, inside: Spectrum, left: tuple[Array, ...], right: tuple[Array, ...]) -> Spectrum:
    """The spectrum of -G from that in the bases: blocks (out, d) and (in, d)."""
    u = ops.matmul(ops.concat(left, axis=-1), inside.u)  # (out, r)
    vt = ops.matmul(inside.vt, ops.matrix_transpose(ops.concat(right, axis=-1)))  # (r, in)
    return of_descent(ops, inside._replace(u=u, vt=vt))


def _norms(
    ops: Ops,
    s: Array,
    earlier: list[Array],
    second: Array,
    of_residual: tuple[Array, Array, Array],
    rank: int,
) -> dict[str, Array]:
    """norm, norm_error, unseen and best_norm of `Spectrum`.

    Args:
        s: singular values of the projected G, (K,).
        earlier: of what it was up to three passes ago, the latest last.
        second: coordinates of Q_1^T G, what the second pass found.
        of_residual: (scale, residual, residual_variance) of the state.
    """
    # ||G||_F^2 = ||Q_1^T G||_F^2 + residual: the first term is known, and the second was estimated from probes that are
    # independent of the basis it refers to. What later passes found is part of that residual.
    unit, residual, variance = of_residual
    scale = nonzero(ops, unit)
    seen = sum_of_squares(ops, s / scale[..., None], axes=1)
    first = sum_of_squares(ops, second / scale[..., None, None])
    unseen = at_least_zero(ops, first + residual - seen)
    norm = ops.sqrt(seen + unseen)
    error = ops.sqrt(variance) / (2.0 * nonzero(ops, norm))  # d sqrt(x) = dx / (2 sqrt(x))
    energies = [sum_of_squares(ops, x[..., :rank] / scale[..., None], axes=1) for x in (*earlier, s)]
    best = ops.sqrt(energies[-1] + _energy_to_come(ops, energies, unseen))
    norms = {"norm": norm, "norm_error": error, "unseen": ops.sqrt(unseen), "best_norm": best}
    return {name: value * unit for name, value in norms.items()}


def _projected(ops: Ops, coordinates: tuple[Array, ...], passes: int) -> Array:
    """G in the bases that the first `passes` passes ended with, (K, K'): rows of the left one, columns of the right."""
    # Of the passes that probed the same side as the last one. Their blocks come one after the other, and each pass
    # knows only those up to its own.
    of_side = coordinates[(passes - 1) % 2 : passes : 2]
    full = [_with_rows(ops, x, of_side[-1].shape[-2]) for x in of_side]
    projected = ops.concat(full, axis=-1)
    return projected if passes % 2 else ops.matrix_transpose(projected)


def _with_rows(ops: Ops, x: Array, rows: int) -> Array:
    """x with zeros under it."""
    missing = rows - x.shape[-2]
    return ops.concat([x, ops.zeros((*x.shape[:-2], missing, x.shape[-1]), like=x)], axis=-2) if missing else x


def _energy_to_come(ops: Ops, energies: list[Array], unseen: Array) -> Array:
    """What more passes would still add to the energy of the r leading directions, (), in units of scale^2.

    Two passes, one on each side, are taken to bring that energy nearer to its limit by the same factor as the two that
    were made a pass before them: what is to come is to that of two passes ago as that of one pass ago to that of three.
    It cannot be more than all that is unseen, which is what remains to be said after two passes.

    Args:
        energies: after the last four passes, the latest last; fewer if there were fewer.
    """
    none = [ops.zeros(unseen.shape, like=unseen)] * (4 - len(energies))  # the energy before the first pass
    earlier, before, last = (at_least_zero(ops, y - x) for x, y in itertools.pairwise([*none, *energies]))
    # x / (x + last + before) = (x + last) / (x + last + before + earlier), solved for x
    slower = at_least_zero(ops, earlier - last) + MIN_RELATIVE_GAIN * energies[-1]
    return smaller(ops, last * (last + before) / nonzero(ops, slower), unseen)


def _new_directions(ops: Ops, rest: Array, known: tuple[Array, ...], k: int) -> Array:
    """An orthonormal basis of range(rest) minus range(known), (rows, k), `rest` being projected once already.

    Columns are zero where the space is exhausted.
    """
    rows = rest.shape[-2]
    d = min(rest.shape[-1], rows - _columns(known))
    if d == 0:
        return ops.zeros((*rest.shape[:-1], k), like=rest)
    q, _ = ops.qr(rest[..., :d])
    if known:
        # Twice is enough (Kahan; Parlett 1980), except where nothing was left of x but rounding noise and `known` spans
        # much of the space: little of the noise is outside then, and a third projection settles it.
        crowded = REORTHOGONALIZE_THRESHOLD * (_columns(known) + d) > rows
        for _ in range(2 if crowded else 1):
            q, _ = ops.qr(_project_out(ops, q, known)[0])
    return q if d == k else ops.concat([q, ops.zeros((*rest.shape[:-1], k - d), like=rest)], axis=-1)


def _fit_block(block: Array, known: tuple[Array, ...]) -> Array:
    """The columns of a new block, (rows, k), for which there is room beside the known ones: (rows, d)."""
    return block[..., : min(block.shape[-1], block.shape[-2] - _columns(known))]


def _project_out(ops: Ops, x: Array, known: tuple[Array, ...]) -> tuple[Array, list[Array]]:
    """x less its projections on orthonormal blocks, and q^T x of each: what the ones before took away is not in q."""
    split = as_one_program(ops, split_by_projection)
    coordinates = []
    for q in known:
        x, its = split(x, q)
        coordinates.append(its)
    return x, coordinates


def _estimate_residual(ops: Ops, g_right: Array, mixing: Array) -> tuple[Array, Array, Array]:
    """What range(G omega) misses of G, by leaving one column out (Epperly and Tropp 2024, arXiv 2207.06342, sec. 2.3).

    (scale, residual, residual_variance) of `SketchState`.

    Column j of omega is independent of the range of all other columns, so the squared distance of G omega_j from that
    range is an unbiased estimate of what a sketch of k - 1 columns misses: slightly too large for one of k.
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
    mean = ops.sum(distance, axis=-1) / k
    variance = sum_of_squares(ops, distance - mean[..., None], axes=1) / (k * max(k - 1, 1))
    return scale, mean, variance


def _columns(blocks: tuple[Array, ...]) -> int:
    return sum(block.shape[-1] for block in blocks)
