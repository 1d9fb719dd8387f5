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


MIN_UNCANCELLED_SHARE = 0.01  # of ||G||^2 left of what it is summed from: in float32, five digits


def exact_spectrum(ops: Ops, gradient: Gradient, rank: int) -> Spectrum:
    """The `rank` leading singular triplets of -G, as exact as a dense SVD.

    Of a large G by products with it, until what it and the triplets disagree by is down to the rounding error that
    LAPACK's triplets have too; where that takes too many directions, and where G is small, by the dense SVD. The
    products are counted at run time: of a large G this cannot be traced.

    Args:
        gradient: G = dL/dW, (out, in), float32 or wider.
        rank: r <= min(out, in).
    """
    return exact_spectra(ops, [gradient], rank)[0]


def exact_spectra(ops: Ops, gradients: Sequence[Gradient], rank: int) -> list[Spectrum]:
    """`exact_spectrum` of matrices of one shape and dtype, together."""
    if isinstance(gradients[0], RowProduct):
        return [_exact_of_rows(ops, g, rank) for g in gradients]
    found = _leading_triplets(ops, gradients, rank)
    spectra: dict[int, Spectrum] = {}
    done = {i: triplets for i, triplets in enumerate(found) if triplets is not None}
    if done:
        norms = [frobenius_norm(ops, gradients[i], nonzero(ops, triplets.s[0])) for i, triplets in done.items()]
        some = _of_triplets(ops, stack_of(ops, list(done.values())), stacked(ops, norms))
        spectra |= zip(done, unstacked(some, len(done)), strict=True)
    rest = [i for i in range(len(found)) if i not in done]
    if rest:
        u, s, vt = thin_svd(ops, stacked(ops, [gradients[i] for i in rest]))
        some = of_descent(ops, fully_seen(ops, u, s, vt, rank))
        spectra |= zip(rest, unstacked(some, len(rest)), strict=True)
    return [spectra[i] for i in range(len(found))]


def _exact_of_rows(ops: Ops, gradient: RowProduct, rank: int) -> Spectrum:
    norm, share = norm_of_rows(ops, gradient)
    cancels = ops.to_numpy(share) < MIN_UNCANCELLED_SHARE
    [found] = [None] if cancels else _leading_triplets(ops, [gradient], rank)
    if found is None:
        return exact_spectrum(ops, as_matrix(ops, gradient), rank)
    return _of_triplets(ops, found, norm)


class Plan(NamedTuple):
    """How the leading triplets of a G in memory are looked for: by products with blocks of vectors."""

    width: int  # columns of a block
    limit: int  # directions, from where on the dense SVD is the faster one


def plan(shape: tuple[int, int], rank: int) -> Plan | None:
    """The plan for a G, (out, in), or None where the dense SVD is faster from the start."""
    width, limit = rank + EXACT_OVERSAMPLE, min(shape) // 4
    return Plan(width, limit) if 3 * width <= limit else None


def _leading_triplets(ops: Ops, gradients: Sequence[Gradient], rank: int) -> list[Triplets | None]:
    found = plan(gradients[0].shape, rank)
    if found is None:
        return [None] * len(gradients)
    omega = draw_omega(0, "exact", gradients[0].shape[1], found.width)
    like = arrays_of(gradients[0])[0]
    return leading_triplets(ops, gradients, ops.asarray(omega, like=like), rank, found.limit)


def _of_triplets(ops: Ops, triplets: Triplets, norm: Array) -> Spectrum:
    zero = ops.zeros(triplets.s.shape[:-1], like=triplets.s)
    best = vector_norm(ops, triplets.s)
    return of_descent(ops, Spectrum(*triplets, norm=norm, norm_error=zero, unseen=zero, best_norm=best))
