"""A gradient in memory -> its leading singular triplets, by the dense SVD or, of a large one, by products."""

from collections.abc import Sequence

from .arrays import nonzero, smaller, thin_svd
from .gradient import Gradient, RowProduct, arrays_of, as_matrix, frobenius_norm, norm_of_rows
from .krylov import CHECKS, Triplets, leading_triplets
from .omega import draw_omega
from .ops import Array, Ops
from .spectrum import Spectrum, fully_seen, of_descent
from .stacking import stack_of, stacked, unstacked

ENOUGH = 0.9999  # share of the energy of the best rank-r part at which no more products are made
EXACT_OVERSAMPLE = 8  # columns beyond the rank in the products with a G in memory
MIN_UNCANCELLED_SHARE = 0.01  # of ||G||^2, for `norm_of_rows` to be used: leaves five digits in float32


def exact_spectrum(ops: Ops, gradient: Gradient, rank: int) -> Spectrum:
    """The `rank` leading singular triplets of -G, all of which is known.

    A small G is decomposed by the dense SVD. A large one is multiplied with blocks of vectors until the triplets hold
    `ENOUGH` of the best energy, by an estimate that is rather too small; a flat spectrum may end below it, after the
    last of `krylov.CHECKS`. How many products are made depends on the values, so for a large G this function cannot be
    traced.

    Args:
        gradient: G = dL/dW, (out, in), float32 or wider.
        rank: r <= min(out, in).
    """
    return exact_spectra(ops, [gradient], rank)[0]


def exact_spectra(ops: Ops, gradients: Sequence[Gradient], rank: int) -> list[Spectrum]:
    """Do what `exact_spectrum` does for several matrices of one shape and dtype together."""
    if isinstance(gradients[0], RowProduct):
        return [_exact_of_rows(ops, g, rank) for g in gradients]
    if is_multiplied(gradients[0].shape, rank):
        triplets = _leading_triplets(ops, gradients, rank)
        norms = [frobenius_norm(ops, g, nonzero(ops, each.s[0])) for g, each in zip(gradients, triplets, strict=True)]
        stack = _of_triplets(ops, stack_of(ops, triplets), stacked(ops, norms))
    else:
        stack = of_descent(ops, fully_seen(ops, *thin_svd(ops, stacked(ops, gradients)), rank))
    return unstacked(stack, len(gradients))


def _exact_of_rows(ops: Ops, gradient: RowProduct, rank: int) -> Spectrum:
    if is_multiplied(gradient.shape, rank):
        norm, share = norm_of_rows(ops, gradient)
        if ops.to_numpy(share) >= MIN_UNCANCELLED_SHARE:
            [triplets] = _leading_triplets(ops, [gradient], rank)
            return _of_triplets(ops, triplets, norm)
    return exact_spectrum(ops, as_matrix(ops, gradient), rank)


def is_multiplied(shape: tuple[int, int], rank: int) -> bool:
    """Return whether a G of shape (out, in) goes through products with vectors, and not through the dense SVD."""
    return CHECKS[-1] * (rank + EXACT_OVERSAMPLE) <= min(shape)


def _leading_triplets(ops: Ops, gradients: Sequence[Gradient], rank: int) -> list[Triplets]:
    in_features = gradients[0].shape[1]
    omega = draw_omega(0, "exact", in_features, rank + EXACT_OVERSAMPLE)
    like = arrays_of(gradients[0])[0]
    return leading_triplets(ops, gradients, ops.asarray(omega, like=like), rank, 1.0 - ENOUGH)


def _of_triplets(ops: Ops, triplets: Triplets, norm: Array) -> Spectrum:
    zero = ops.zeros(triplets.s.shape[:-1], like=triplets.s)
    best = smaller(ops, triplets.best_norm, norm)
    u, s, vt, _ = triplets
    return of_descent(ops, Spectrum(u, s, vt, norm=norm, norm_error=zero, unseen=zero, best_norm=best))
