"""A gradient in memory -> its leading singular triplets, as exact as a dense SVD."""

from collections.abc import Sequence
from typing import NamedTuple

from .arrays import nonzero, thin_svd, vector_norm
from .gradient import Gradient, RowProduct, arrays_of, as_matrix, frobenius_norm, norm_of_rows
from .krylov import Triplets, leading_triplets
from .omega import draw_omega
from .ops import Array, Ops
from .spectrum import Spectrum, fully_seen, of_descent
from .stacking import stack_of, stacked, unstacked

EXACT_OVERSAMPLE = 8  # columns beyond the rank in the products with a G in memory
MIN_UNCANCELLED_SHARE = 0.01  # of ||G||^2, for `norm_of_rows` to be used: leaves five digits in float32


def exact_spectrum(ops: Ops, gradient: Gradient, rank: int) -> Spectrum:
    """The `rank` leading singular triplets of -G, as exact as a dense SVD.

    A small G is decomposed by the dense SVD. A large one is multiplied with blocks of vectors until the triplets fit G
    to within the rounding error of LAPACK's own triplets; if that needs too many directions, the dense SVD follows.
    How many products are made depends on the values, so for a large G this function cannot be traced.

    Args:
        gradient: G = dL/dW, (out, in), float32 or wider.
        rank: r <= min(out, in).
    """
    return exact_spectra(ops, [gradient], rank)[0]


def exact_spectra(ops: Ops, gradients: Sequence[Gradient], rank: int) -> list[Spectrum]:
    """Do what `exact_spectrum` does for several matrices of one shape and dtype together."""
    if isinstance(gradients[0], RowProduct):
        return [_exact_of_rows(ops, g, rank) for g in gradients]
    attempts = _leading_triplets(ops, gradients, rank)
    spectra: dict[int, Spectrum] = {}
    converged = {i: triplets for i, triplets in enumerate(attempts) if triplets is not None}
    if converged:
        norms = [frobenius_norm(ops, gradients[i], nonzero(ops, triplets.s[0])) for i, triplets in converged.items()]
        stack = _of_triplets(ops, stack_of(ops, list(converged.values())), stacked(ops, norms))
        spectra |= zip(converged, unstacked(stack, len(converged)), strict=True)
    remaining = [i for i in range(len(attempts)) if i not in converged]
    if remaining:
        u, s, vt = thin_svd(ops, stacked(ops, [gradients[i] for i in remaining]))
        stack = of_descent(ops, fully_seen(ops, u, s, vt, rank))
        spectra |= zip(remaining, unstacked(stack, len(remaining)), strict=True)
    return [spectra[i] for i in range(len(attempts))]


def _exact_of_rows(ops: Ops, gradient: RowProduct, rank: int) -> Spectrum:
    norm, share = norm_of_rows(ops, gradient)
    cancels = ops.to_numpy(share) < MIN_UNCANCELLED_SHARE
    [triplets] = [None] if cancels else _leading_triplets(ops, [gradient], rank)
    if triplets is None:
        return exact_spectrum(ops, as_matrix(ops, gradient), rank)
    return _of_triplets(ops, triplets, norm)


class Plan(NamedTuple):
    """How to search for the leading triplets of a G in memory by products with blocks of vectors."""

    width: int  # columns of a block
    limit: int  # number of directions beyond which the dense SVD is faster


def plan(shape: tuple[int, int], rank: int) -> Plan | None:
    """Return the plan for a G of shape (out, in), or None where the dense SVD is faster from the start."""
    width, limit = rank + EXACT_OVERSAMPLE, min(shape) // 4
    return Plan(width, limit) if 3 * width <= limit else None


def _leading_triplets(ops: Ops, gradients: Sequence[Gradient], rank: int) -> list[Triplets | None]:
    search = plan(gradients[0].shape, rank)
    if search is None:
        return [None] * len(gradients)
    omega = draw_omega(0, "exact", gradients[0].shape[1], search.width)
    like = arrays_of(gradients[0])[0]
    return leading_triplets(ops, gradients, ops.asarray(omega, like=like), rank, search.limit)


def _of_triplets(ops: Ops, triplets: Triplets, norm: Array) -> Spectrum:
    zero = ops.zeros(triplets.s.shape[:-1], like=triplets.s)
    best = vector_norm(ops, triplets.s)
    return of_descent(ops, Spectrum(*triplets, norm=norm, norm_error=zero, unseen=zero, best_norm=best))
