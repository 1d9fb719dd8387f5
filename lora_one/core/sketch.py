"""Gradient -> truncated SVD by a sketch that LoRA's own gradients supply.

The sketch rests on two identities. Give a layer y = W x + B A x factors whose product is zero, so that the model still
computes the same function, and let G = dL/dW, (out, in). Then

    A = V^T, B = 0    the gradient of B is G V
    A = 0,   B = Q    the gradient of A is Q^T G

These are the two products that a randomised SVD needs (Halko, Martinsson and Tropp 2011, arXiv 0909.4061). No gradient
of W is ever formed, so W may be quantised or sharded.

Here the sketch is a small state machine with one state per layer. A backend installs what `probe` returns, runs a
backward pass, and gives the gradient to `advance`. From two passes on, `finish` may be called at any time:

    state = start(ops, omega, out_features)
    for _ in range(passes):
        state = advance(ops, state, gradient_of(probe(ops, state)))
    spectrum = finish(ops, state, rank)

Every pass probes only directions that no earlier pass has seen, so the bases of all passes together span a block Krylov
space (Musco and Musco 2015, arXiv 1504.05477), in the numerically stable form: block Golub-Kahan bidiagonalisation with
full reorthogonalisation.

Layers of equal shape may go through it together, as arrays with one more leading axis: it saves kernel launches, which
a GPU otherwise waits for.
"""

from typing import Literal, NamedTuple

from .arrays import thin_svd
from .bases import KrylovBases, columns, completed, extend, projected
from .estimates import ResidualEstimate, estimate_norms, estimate_residual
from .ops import Array, Ops, as_one_program
from .spectrum import Spectrum, fully_seen, of_descent

Side = Literal["A", "B"]


class Probe(NamedTuple):
    """The LoRA factor to install, at scale 1, for one pass.

    The other factor is zero, and `advance` needs its gradient.
    """

    side: Side
    factor: Array  # lora_A, (k, in), or lora_B, (out, k)


class SketchState(NamedTuple):
    """All that the passes so far have learnt about G. For a stack of layers, all arrays have a leading axis."""

    bases: KrylovBases
    mixing: Array  # (k, k): omega = bases.right[0] @ mixing
    scale: Array  # (), this and the next two: see `ResidualEstimate`
    residual: Array  # ()
    residual_variance: Array  # ()

    @property
    def passes(self) -> int:
        """The number of gradients that the state has taken in."""
        return self.bases.products


def start(ops: Ops, omega: Array, out_features: int) -> SketchState:
    """Return the state before the first pass.

    Args:
        omega: Gaussian test matrix, (in, k), float32 or wider, k <= min(out, in): see `draw_omega`; or a stack of them.
        out_features: rows of G.
    """
    in_features, k = omega.shape[-2:]
    if k > min(in_features, out_features):
        raise ValueError(f"sketch width must be <= min(out, in) = {min(in_features, out_features)}, got {k}")
    # Orthonormal columns span the same subspaces as omega itself. They also let `finish` use the last products as they
    # are when the passes stop after an odd one.
    v, mixing = ops.qr(omega)  # (in, k), (k, k)
    zero = ops.zeros(omega.shape[:-2], like=omega)
    return SketchState(KrylovBases(v), mixing, zero, zero, zero)


def probe(ops: Ops, state: SketchState) -> Probe:
    """Return the factor to install in the next pass."""
    if state.passes % 2 == 0:
        return Probe("A", ops.matrix_transpose(state.bases.next_probe))
    return Probe("B", state.bases.next_probe)


def advance(ops: Ops, state: SketchState, gradient: Array) -> SketchState:
    """Return the state after a pass.

    Args:
        gradient: the gradient of the factor that was zero: lora_B's, (out, k), after a pass with lora_A installed;
            lora_A's, (k, in), after one with lora_B. In the dtype of the state.
    """
    if state.passes == 0:
        estimate = as_one_program(ops, estimate_residual)(gradient, state.mixing)
        state = state._replace(**estimate._asdict())
    product = gradient if state.passes % 2 == 0 else ops.matrix_transpose(gradient)  # G V, (out, k), or G^T Q, (in, k)
    return state._replace(bases=extend(ops, state.bases, product))


def advance_on(ops: Ops, state: SketchState, gradient: Array) -> SketchState:
    """Return the state after a pass on a G that is at hand as a matrix, (out, in), instead of a backward pass."""
    side, factor = probe(ops, state)
    if side == "A":
        return advance(ops, state, ops.matmul(gradient, ops.matrix_transpose(factor)))  # (out, k) = G V
    return advance(ops, state, ops.matmul(ops.matrix_transpose(factor), gradient))  # (k, in) = Q^T G


def finish(ops: Ops, state: SketchState, rank: int) -> Spectrum:
    """The leading triplets of -G projected on all directions probed so far (block Krylov), after >= 2 passes."""
    if state.passes < 2:
        raise ValueError(f"a sketch needs at least 2 passes, got {state.passes}")
    bases = state.bases
    left, right = completed(bases)
    directions = min(columns(left), columns(right))
    if rank > directions:
        raise ValueError(f"rank must be <= {directions}, the directions probed, got {rank}")
    whole = columns(bases.left) == left[0].shape[-2] or columns(bases.right) == right[0].shape[-2]
    estimate = ResidualEstimate(state.scale, state.residual, state.residual_variance)
    in_bases = as_one_program(ops, _spectrum_in_bases, ("rank", "whole"))
    inside = in_bases(bases.coordinates, estimate, rank=rank, whole=whole)
    return as_one_program(ops, _to_full_space)(inside, left, right)


def _spectrum_in_bases(
    ops: Ops, coordinates: tuple[Array, ...], estimate: ResidualEstimate, rank: int, whole: bool
) -> Spectrum:
    """The spectrum of G in the coordinates of the bases: u is (K, r), vt is (r, K), and signs are not set.

    Args:
        coordinates: those of the bases.
        estimate: that of the state.
        rank: the number of triplets.
        whole: whether one of the bases spans its space, so that all of G was seen.
    """
    passes = len(coordinates)
    u, s, vt = thin_svd(ops, projected(ops, coordinates))
    if whole:
        return fully_seen(ops, u, s, vt, rank)
    earlier = range(max(1, passes - 3), passes)
    earlier_values = [ops.svdvals(projected(ops, coordinates[:number])) for number in earlier]
    norms = estimate_norms(ops, s, earlier_values, coordinates[1], estimate, rank)
    return Spectrum(u[..., :rank], s[..., :rank], vt[..., :rank, :], **norms)


def _to_full_space(ops: Ops, inside: Spectrum, left: tuple[Array, ...], right: tuple[Array, ...]) -> Spectrum:
    """The spectrum of -G from that of G in the coordinates of the bases: blocks (out, d) and (in, d)."""
    u = ops.matmul(ops.concat(left, axis=-1), inside.u)  # (out, r)
    vt = ops.matmul(inside.vt, ops.matrix_transpose(ops.concat(right, axis=-1)))  # (r, in)
    return of_descent(ops, inside._replace(u=u, vt=vt))
