"""The answers, computed another way, so that the spec is not its own judge. Shares no code with the spec.

This file has the primitives, `oracle_spectra` the exact spectrum and the fold, `oracle_steps` everything else. They
run only when the vectors are made.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from lora_one.conformance.types import View

from . import oracle_spectra, oracle_steps
from .cases import Case
from .linalg import Inputs, Long, Params, gesvd, inverse

_MASK = 2**64 - 1


def oracle(case: Case, eps: float) -> View:
    """The answers of a case.

    Args:
        case: the case.
        eps: that of the working precision. Some damping in the spec depends on it.
    """
    inputs = [np.asarray(x, dtype=np.float64) for x in case.inputs]
    if case.computation in _UNNAMED:
        return {str(i): np.asarray(x) for i, x in enumerate(_UNNAMED[case.computation](inputs))}
    return _NAMED[case.computation](inputs, case.params, eps)


def _reduced(reduce: Callable[[np.ndarray], Any]) -> Callable[[Inputs], list[Any]]:
    return lambda xs: [
        reduce(xs[0]),
        np.array([reduce(column) for column in xs[0].T]),
        np.array([reduce(row) for row in xs[0]]),
    ]


def _qr(inputs: Inputs, params: Params, eps: float) -> View:
    x = inputs[0]
    k = x.shape[1]
    view = {"Q R": x, "Q^T Q": np.eye(k), "below R": np.zeros((k, k))}
    if params["full_rank"]:
        wide = x.astype(Long)
        view["Q Q^T"] = wide @ inverse(wide.T @ wide) @ wide.T
    return view


def _singular_values(x: np.ndarray) -> np.ndarray:
    batch = x.reshape(-1, *x.shape[-2:])
    return np.stack([gesvd(matrix)[1] for matrix in batch]).reshape(*x.shape[:-2], min(x.shape[-2:]))


def _svd(inputs: Inputs, params: Params, eps: float) -> View:
    s = _singular_values(inputs[0])
    identity = np.broadcast_to(np.eye(s.shape[-1]), (*s.shape, s.shape[-1]))
    return {"U S V^T": inputs[0], "S": s, "U^T U": identity, "V^T V": identity}


def _not_definite(inputs: Inputs, params: Params, eps: float) -> View:
    gram, rhs = inputs
    bad = np.array([np.linalg.eigvalsh(x)[0] <= 0 for x in gram])[:, None, None] & np.ones(rhs.shape, bool)
    solved = inverse(gram.astype(Long)) @ rhs.astype(Long)
    return {"NaN": bad.astype(float), "the others": np.where(bad, 0.0, solved)}


def _omega(inputs: Inputs, params: Params, eps: float) -> View:
    """NumPy's normal numbers, once the random bits that they are made from are confirmed by `_philox`."""
    digest = hashlib.blake2b(f"{params['seed']}/{params['layer']}".encode(), digest_size=16).digest()
    key = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(8).tolist()
    if bits != [*_philox([1, 0, 0, 0], key), *_philox([2, 0, 0, 0], key)]:
        raise ValueError("NumPy's Philox does not give the published stream")
    random = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
    return {"0": random.standard_normal(tuple(params["shape"]))}


def _philox(counter: list[int], key: list[int]) -> list[int]:
    """Four 64-bit random numbers by Philox4x64-10 (Salmon et al. 2011)."""
    key = list(key)
    for _ in range(10):
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & _MASK,
            (first >> 64) ^ counter[3] ^ key[1],
            first & _MASK,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & _MASK, (key[1] + 0xBB67AE8584CAA73B) & _MASK]
    return counter


# Computations whose results are compared as they are: (inputs) -> results.
_UNNAMED: dict[str, Callable[[Inputs], Any]] = {
    "asarray, to_numpy": lambda xs: xs,
    "astype, at_least_float32": lambda xs: [xs[0].astype(Long) / 3, xs[0]],
    "matmul": lambda xs: [np.einsum("...ij,...jk->...ik", *(x.astype(Long) for x in xs))],
    "matrix_transpose": lambda xs: [np.einsum("...ij->...ji", xs[0])],
    "svdvals": lambda xs: [_singular_values(xs[0])],
    "cholesky_solve": lambda xs: [inverse(xs[0].astype(Long)) @ xs[1].astype(Long)],
    "eye": lambda xs: [np.diag(np.ones(1)), np.diag(np.ones(5))],
    "zeros": lambda xs: [np.array(0.0), np.array([0.0] * 3), np.array([[0.0] * 4] * 2)],
    "sqrt": lambda xs: [np.sqrt(xs[0].astype(Long))],
    "sum": _reduced(lambda x: np.sum(x.astype(Long))),
    "max": _reduced(lambda x: max(x.ravel().tolist())),
    "isfinite, comparisons": lambda xs: [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0]],
    "where": lambda xs: [
        [[y if np.isnan(x) else x for x, y in zip(*rows, strict=True)] for rows in zip(*xs, strict=True)],
        [row if row[0] > 0 else 0 * row for row in xs[1]],
    ],
    "concat": lambda xs: [[*xs[0], *xs[1]], [[*a, *b] for a, b in zip(*xs, strict=True)]],
    "stack": lambda xs: [[xs[0], xs[1]], [[a, b] for a, b in zip(*xs, strict=True)]],
}

# All others: (inputs, params, eps) -> the parts that are compared, by name.
_NAMED: dict[str, Callable[[Inputs, Params, float], View]] = {
    "qr": _qr,
    "svd": _svd,
    "cholesky_solve, not definite": _not_definite,
    "eps": lambda inputs, params, eps: {"0": np.array(eps)},
    "omega": _omega,
    "exact spectrum": oracle_spectra.exact,
    "fold, after each batch": oracle_spectra.fold,
    "factors, normalized": oracle_steps.normalized_factors,
    "factors, gradient": oracle_steps.gradient_factors,
    "factors, plain": oracle_steps.plain_factors,
    "start without data": oracle_steps.deferred_start,
    "precondition": oracle_steps.precondition,
    "gradient descent": oracle_steps.gradient_descent,
    "AdamW": oracle_steps.adamw,
    "alignment": oracle_steps.alignment,
}
