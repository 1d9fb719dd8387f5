"""The oracle of the spectra: LAPACK's other SVD, and for the fold a projection in 60 digits.

The projection is the orthogonal one on the block Krylov space that the products of a fold span.
"""

import mpmath
import numpy as np

from lora_one.conformance.types import View

from .linalg import Inputs, Params, gesvd

DIGITS = 60


def exact(inputs: Inputs, params: Params, eps: float) -> View:
    g = inputs[0]
    unit = np.max(np.abs(g)) or 1.0
    norm = float(np.linalg.norm(g / unit))
    _, s, _ = gesvd(g / unit)
    return _spectrum(g / unit, params, norm, 0.0, 0.0, float(np.linalg.norm(s[: params["rank"]])))


def fold(inputs: Inputs, params: Params, eps: float) -> View:
    omega, test, random_left, gradient, dy, x = inputs
    unit = np.max(np.abs(gradient)) or 1.0
    gradients = [gradient / unit, dy.T @ x / unit]
    total, k = gradients[0] + gradients[1], omega.shape[1]
    nothing = np.zeros_like(total)
    first, second = (_renewed(nothing, omega, g, k) for g in gradients)
    both = _renewed(first, gesvd(first)[2][:k].T, gradients[1], k)
    merged = _cut(first + second, k)
    two_passes = _read(total, gesvd(total @ omega)[0], gesvd(total.T @ random_left)[0], k)
    constant = np.full(k, 1 / 8)
    stages = {
        "1 batch": (gradients[0], first, constant),
        "2 batches": (total, both, constant),
        "2 batches, both sides": (total, *_read(total, *_sides(both, k), k)),
        "2 batches, merged": (total, merged, constant),
        "2 passes from random sides": (total, *two_passes),
        "3 passes from random sides": (total, *_read(total, *_sides(two_passes[0], k), k)),
    }
    view = {
        f"{name}: {key}": value
        for name in params["stages"]
        for key, value in _fold_view(*stages[name], test, params).items()
    }
    return {"random sides: B A": nothing, **view}


def _renewed(before: np.ndarray, directions: np.ndarray, gradient: np.ndarray, k: int) -> np.ndarray:
    return _cut(_krylov_part(before + gradient, directions), k)


def _sides(running: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    u, _, vt = gesvd(running)
    return u[:, :k], vt[:k].T


def _read(g: np.ndarray, u: np.ndarray, v: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best rank-k part of G without the block outside U and V; and how far its triplets lie outside, (k,)."""
    beyond_u, beyond_v = np.eye(len(u)) - u @ u.T, np.eye(len(v)) - v @ v.T
    running = _cut(g - beyond_u @ g @ beyond_v, k)
    new_u, new_v = _sides(running, k)
    return running, np.sum((beyond_u @ new_u) ** 2, axis=0) + np.sum((beyond_v @ new_v) ** 2, axis=0)


def _fold_view(g: np.ndarray, running: np.ndarray, turn: np.ndarray, test: np.ndarray, params: Params) -> View:
    """The view of a running SVD, in units of the largest entry of the first gradient."""
    r, k = params["rank"], len(turn)
    s = gesvd(running)[1][:k]
    if k == min(g.shape):
        norms = float(np.linalg.norm(s)), 0.0, 0.0, float(np.linalg.norm(s[:r]))
        return _spectrum(running, params, *norms)
    distances = np.sum(((g - running) @ test) ** 2, axis=0)
    unseen = float(np.mean(distances))
    norm = float(np.sqrt(np.sum(s**2) + unseen))
    variance = np.sum((distances - unseen) ** 2) / (len(distances) * (len(distances) - 1))
    norm_error = np.sqrt(variance) / (2.0 * norm) if norm else 0.0
    to_come = sum(turn[i] * s[-1] ** 2 / max(1 - (s[-1] / s[i]) ** 2, 1e-3) for i in range(r) if s[i])
    best = float(np.sqrt(np.sum(s[:r] ** 2) + min(unseen, to_come)))
    return _spectrum(running, params, norm, norm_error, unseen, best)


def _krylov_part(h: np.ndarray, v: np.ndarray) -> np.ndarray:
    """H projected on range([H V, H H^T H V]), in many digits."""
    mpmath.mp.dps = DIGITS
    big = _long(h)
    block = big @ _long(v)
    q = _orthonormal(np.concatenate([block, big @ (big.T @ block)], axis=1))
    return (q @ (q.T @ big)).astype(np.float64) if q.size else 0.0 * h


def _cut(x: np.ndarray, k: int) -> np.ndarray:
    """The best rank-k part."""
    u, s, vt = gesvd(x)
    return (u[:, :k] * s[:k]) @ vt[:k]


def _spectrum(
    seen: np.ndarray, params: Params, norm: float, norm_error: float, unseen_squared: float, best: float
) -> View:
    """The view of the spectrum of `seen`, in units of the largest entry of G."""
    r = params["rank"]
    u, s, vt = gesvd(seen)
    view = {
        "S": s[:r],
        "norm": np.array(norm),
        "best norm": np.array(best),
        "norm^2 + unseen^2": np.array(norm**2 + unseen_squared),
        "norm^2 + norm error": np.array(norm**2 + norm * norm_error),
        "U^T U": np.eye(r),
        "V^T V": np.eye(r),
    }
    if params["gap"]:
        view["U S V^T"] = -(u[:, :r] * s[:r]) @ vt[:r]
    if params["signs"]:
        view["signs"] = np.ones(r)
    return view


def _long(x: np.ndarray) -> np.ndarray:
    return np.vectorize(mpmath.mpf, otypes=[object])(x)


def _orthonormal(x: np.ndarray) -> np.ndarray:
    """Orthonormalise columns by Gram-Schmidt, twice, in many digits. Dependent columns are dropped."""
    largest = max((abs(entry) for entry in x.ravel()), default=0)
    basis: list[np.ndarray] = []
    for column in x.T:
        remainder = column
        for _ in range(2):
            for q in basis:
                remainder = remainder - q * np.dot(q, remainder)
        size = mpmath.sqrt(np.dot(remainder, remainder))
        if size > largest * mpmath.mpf(10) ** (-DIGITS // 2):
            basis.append(remainder / size)
    return np.stack(basis, axis=1) if basis else x[:, :0]
