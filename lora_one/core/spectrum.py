"""The leading singular triplets of a gradient, and the norms that say how much they leave out."""

from typing import NamedTuple

from .arrays import smaller, vector_norm
from .ops import Array, Ops


class Spectrum(NamedTuple):
    """The leading singular triplets of the descent direction, -G ~ u diag(s) vt, and how much of G they leave out.

    The sign of each pair u_i, v_i makes the entry of u_i that is largest in magnitude positive. The shapes below are
    for one layer; for a stack of layers, all arrays have a leading axis.
    """

    u: Array  # (out, r)
    s: Array  # (r,), descending
    vt: Array  # (r, in)
    norm: Array  # (), ||G||_F: exact, or an estimate that errs a little on the large side
    norm_error: Array  # (), standard error of `norm`; 0 where it is exact
    unseen: Array  # (), estimate of the norm of what all triplets found, also those after r, leave of G; 0 if nothing
    best_norm: Array  # (), ||G_r||_F of the best rank-r part: exact, or estimated from how far the triplets may turn


def fully_seen(ops: Ops, u: Array, s: Array, vt: Array, rank: int) -> Spectrum:
    """The spectrum of G from an SVD that holds all of G, so that all norms are exact."""
    zero, leading = ops.zeros(s.shape[:-1], like=s), s[..., :rank]
    norms = {"norm": vector_norm(ops, s), "norm_error": zero, "unseen": zero, "best_norm": vector_norm(ops, leading)}
    return Spectrum(u[..., :rank], leading, vt[..., :rank, :], **norms)


def leading(ops: Ops, spectrum: Spectrum, rank: int) -> Spectrum:
    """Return the first `rank` triplets of a spectrum, with the norm of the best part of that rank.

    What the larger part missed of its best is counted as missed here: the smaller part misses no more (interlacing).
    """
    s, best = spectrum.s, spectrum.best_norm
    if rank == s.shape[-1]:
        return spectrum
    held = smaller(ops, vector_norm(ops, s), best)
    missed = ops.sqrt(best - held) * ops.sqrt(best + held)  # the root of a difference of squares, without the squares
    return spectrum._replace(
        u=spectrum.u[..., :rank],
        s=s[..., :rank],
        vt=spectrum.vt[..., :rank, :],
        best_norm=vector_norm(ops, ops.concat([s[..., :rank], missed[..., None]], axis=-1)),
    )


def of_descent(ops: Ops, spectrum: Spectrum) -> Spectrum:
    """Turn the spectrum of G into that of -G, with the sign convention of `Spectrum`."""
    u, vt = spectrum.u, spectrum.vt
    positive = ops.astype(ops.max(u, axis=-2) >= ops.max(-u, axis=-2), u.dtype)  # (r,), 1 or 0
    sign = 2.0 * positive - 1.0
    return spectrum._replace(u=u * sign[..., None, :], vt=-vt * sign[..., :, None])
