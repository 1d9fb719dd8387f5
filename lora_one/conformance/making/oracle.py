"""What the answers must be, computed another way: LAPACK through scipy, textbook formulas in longer precision, and for
the sketch an orthogonal projection in 60 digits on the block Krylov space that the passes span. Shares no code with
the spec, and runs only when the vectors are made.
"""

import hashlib
from typing import Any

import mpmath
import numpy as np
import scipy.linalg

from lora_one.conformance.computations import View

from .cases import Case

DIGITS = 60
SETTLED = 1e-5
Long = np.longdouble
_MASK = 2**64 - 1


def oracle(case: Case, eps: float) -> View:
    """The oracle's view of a case; `eps` is that of the working precision, which some damping depends on."""
    inputs = [np.asarray(x, dtype=np.float64) for x in case.inputs]
    name = case.computation
    if name == "eps":
        return {"0": np.array(eps)}
    if name in _BY_HAND:
        return {str(i): np.asarray(x) for i, x in enumerate(_BY_HAND[name](inputs))}
    if name == "svdvals":
        return {"0": _svd(inputs, case.params)["S"]}
    if name in ("qr", "svd", "cholesky_solve, not definite"):
        return {"qr": _qr, "svd": _svd}.get(name, _not_definite)(inputs, case.params)
    if name in ("precondition", "gradient descent", "AdamW"):
        found = {"precondition": _precondition, "gradient descent": _descend, "AdamW": _adamw}[name](
            [x.astype(Long) for x in inputs], case.params, eps
        )
        return {str(i): x.astype(np.float64) for i, x in enumerate(found)}
    if name == "sketch, after each pass":
        return _sketch(inputs, case.params, eps)
    steps = {
        "exact spectrum": _exact,
        "factors, normalized": _normalized,
        "factors, gradient": _scaled,
        "factors, plain": _plain,
        "omega": _omega,
        "alignment": _alignment,
    }
    return steps[name](inputs, case.params)


def _reduced(reduce: Any) -> Any:
    return lambda xs: [
        reduce(xs[0]),
        np.array([reduce(column) for column in xs[0].T]),
        np.array([reduce(row) for row in xs[0]]),
        np.array([[reduce(row)] for row in xs[0]]),
    ]


_BY_HAND: dict[str, Any] = {
    "asarray, to_numpy": lambda xs: xs,
    "astype, at_least_float32": lambda xs: [xs[0].astype(Long) / 3, xs[0]],
    "matmul": lambda xs: [np.einsum("...ij,...jk->...ik", *(x.astype(Long) for x in xs))],
    "matrix_transpose": lambda xs: [np.einsum("...ij->...ji", xs[0])],
    "cholesky_solve": lambda xs: [_inverse(xs[0].astype(Long)) @ xs[1].astype(Long)],
    "eye": lambda xs: [np.diag(np.ones(1)), np.diag(np.ones(5))],
    "zeros": lambda xs: [np.array(0.0), np.array([0.0] * 3), np.array([[0.0] * 4] * 2)],
    "sqrt": lambda xs: [np.sqrt(xs[0].astype(Long))],
    "sum": _reduced(lambda x: np.sum(x.astype(Long))),
    "max": _reduced(lambda x: max(x.ravel().tolist())),
    "isfinite, comparisons": lambda xs: [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0]],
    "concat": lambda xs: [[*xs[0], *xs[1]], [[*a, *b] for a, b in zip(*xs, strict=True)]],
    "stack": lambda xs: [[xs[0], xs[1]], [[a, b] for a, b in zip(*xs, strict=True)]],
}


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Gauss-Jordan with pivoting, in the precision of the argument: (..., r, r)."""
    if matrix.ndim > 2:
        return np.stack([_inverse(one) for one in matrix])
    n = len(matrix)
    work = np.concatenate([matrix, np.eye(n, dtype=matrix.dtype)], axis=1)
    for column in range(n):
        pivot = column + int(np.argmax(np.abs(work[column:, column])))
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = work[column] / work[column, column]
        for row in range(n):
            if row != column:
                work[row] = work[row] - work[row, column] * work[column]
    return work[:, n:]


def _qr(inputs: list[np.ndarray], params: dict[str, Any]) -> View:
    x = inputs[0]
    k = x.shape[1]
    view = {"Q R": x, "Q^T Q": np.eye(k), "below R": np.zeros((k, k))}
    if params["full_rank"]:
        wide = x.astype(Long)
        view["Q Q^T"] = wide @ _inverse(wide.T @ wide) @ wide.T
    return view


def _svd(inputs: list[np.ndarray], params: dict[str, Any]) -> View:
    x = inputs[0]
    p = min(x.shape[-2:])
    batch = x.reshape(-1, *x.shape[-2:])
    s = np.stack([scipy.linalg.svd(one, full_matrices=False, lapack_driver="gesvd")[1] for one in batch])
    identity = np.broadcast_to(np.eye(p), (*x.shape[:-2], p, p))
    return {"U S V^T": x, "S": s.reshape(*x.shape[:-2], p), "U^T U": identity, "V^T V": identity}


def _not_definite(inputs: list[np.ndarray], params: dict[str, Any]) -> View:
    gram, rhs = inputs
    bad = np.array([np.linalg.eigvalsh(one)[0] <= 0 for one in gram])[:, None, None] & np.ones(rhs.shape, bool)
    solved = _inverse(gram.astype(Long)) @ rhs.astype(Long)
    return {"NaN": bad.astype(float), "the others": np.where(bad, 0.0, solved)}


def _omega(inputs: list[np.ndarray], params: dict[str, Any]) -> View:
    """NumPy's normals, after the bits under them were recomputed by hand (Salmon et al. 2011, Philox4x64-10)."""
    digest = hashlib.blake2b(f"{params['seed']}/{params['layer']}".encode(), digest_size=16).digest()
    key = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(8).tolist()
    if bits != [*_philox([1, 0, 0, 0], key), *_philox([2, 0, 0, 0], key)]:
        raise ValueError("NumPy's Philox does not give the published stream")
    random = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
    return {"0": random.standard_normal(tuple(params["shape"]))}


def _philox(counter: list[int], key: list[int]) -> list[int]:
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


def _gesvd(g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = scipy.linalg.svd(g, full_matrices=False, lapack_driver="gesvd")
    return u, s, vt


def _exact(inputs: list[np.ndarray], params: dict[str, Any]) -> View:
    g = inputs[0]
    unit = np.max(np.abs(g)) or 1.0
    norm = np.linalg.norm(g / unit)
    _, s, _ = _gesvd(g / unit)
    return _spectrum(g / unit, params, norm, 0.0, 0.0, np.linalg.norm(s[: params["rank"]]))


def _spectrum(
    seen: np.ndarray, params: dict[str, Any], norm: Any, norm_error: Any, unseen_squared: Any, best: Any
) -> View:
    """The view of the spectrum of `seen`, in units of the largest entry of G."""
    r = params["rank"]
    u, s, vt = _gesvd(seen)
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


def _sketch(inputs: list[np.ndarray], params: dict[str, Any], eps: float) -> View:
    unit = np.max(np.abs(inputs[0])) or 1.0
    g, omega, r = inputs[0] / unit, inputs[1], params["rank"]
    first, error = _left_out(g @ omega, eps)
    view: View = {}
    energies = []
    for passes in range(1, params["passes"] + 1):
        seen, whole = _seen(g, omega, passes)
        _, s, _ = _gesvd(seen)
        energies.append(float(np.sum(s[:r] ** 2)))
        if passes == 1:  # nothing is known of the other side
            continue
        if whole:
            norm, norm_error, unseen, best = np.linalg.norm(g), 0.0, 0.0, np.sqrt(energies[-1])
        else:
            start = np.sum(_seen(g, omega, 2)[0] ** 2)  # ||Q_1^T G||^2
            unseen = max(start + first - np.sum(s**2), 0.0)
            norm = np.sqrt(np.sum(s**2) + unseen)
            norm_error = np.sqrt(error) / (2.0 * norm) if norm else 0.0
            best = np.sqrt(energies[-1] + _to_come(energies, unseen))
        one = _spectrum(seen, params, norm, norm_error, unseen, best)
        view.update({f"{passes} passes: {name}": value for name, value in one.items()})
    return view


def _seen(g: np.ndarray, omega: np.ndarray, passes: int) -> tuple[np.ndarray, bool]:
    """G projected on the block Krylov space of so many passes, and whether that space is everything."""
    mpmath.mp.dps = DIGITS
    big, block = _long(g), _long(omega)
    if passes % 2 == 0:  # rows: range(G W), range(G G^T G W), ...
        blocks = [big @ block]
        for _ in range(passes // 2 - 1):
            blocks.append(big @ (big.T @ blocks[-1]))
        q = _orthonormal(np.concatenate(blocks, axis=1))
        seen = q @ (q.T @ big) if q.size else 0 * big
    else:  # columns: range(W), range(G^T G W), ...
        blocks = [block]
        for _ in range(passes // 2):
            blocks.append(big.T @ (big @ blocks[-1]))
        q = _orthonormal(np.concatenate(blocks, axis=1))
        seen = (big @ q) @ q.T
    probed_right = min((passes + 1) // 2 * omega.shape[1], g.shape[1])
    probed_left = min(passes // 2 * omega.shape[1], g.shape[0])
    return seen.astype(np.float64), probed_right == g.shape[1] or probed_left == g.shape[0]


def _long(x: np.ndarray) -> np.ndarray:
    return np.vectorize(mpmath.mpf, otypes=[object])(x)


def _orthonormal(x: np.ndarray) -> np.ndarray:
    """Gram-Schmidt, twice, in many digits; what is left of a dependent column is dropped."""
    largest = max((abs(entry) for entry in x.ravel()), default=0)
    kept: list[np.ndarray] = []
    for column in x.T:
        rest = column
        for _ in range(2):
            for q in kept:
                rest = rest - q * np.dot(q, rest)
        size = mpmath.sqrt(np.dot(rest, rest))
        if size > largest * mpmath.mpf(10) ** (-DIGITS // 2):
            kept.append(rest / size)
    return np.stack(kept, axis=1) if kept else x[:, :0]


def _left_out(y: np.ndarray, eps: float) -> tuple[float, float]:
    """Mean of the squared distances of each column from the span of the others, and the variance of that mean.

    The spec damps the Gram matrix with eps, for which distances that are rounding alone are not told from zero.
    """
    unit = np.max(np.abs(y))
    if unit == 0.0:
        return 0.0, 0.0
    wide = (y / unit).astype(Long)
    gram = wide.T @ wide
    k = len(gram)
    inverse = _inverse(gram + (4.0 * eps * np.trace(gram) + eps) * np.eye(k, dtype=Long))
    distances = [float(unit**2 / inverse[j, j]) for j in range(k)]
    mean = sum(distances) / k
    return mean, sum((d - mean) ** 2 for d in distances) / (k * max(k - 1, 1))


def _to_come(energies: list[float], unseen: float) -> float:
    """How far the limit is if the last two energies' distances to it are those of the two before, scaled alike."""
    a, b, c, d = [0.0, 0.0, 0.0, *energies][-4:]
    last, before, earlier = max(d - c, 0.0), max(c - b, 0.0), max(b - a, 0.0)
    slower = max(earlier - last, 0.0) + SETTLED * d
    return min(last * (last + before) / slower if slower else 0.0, unseen)


def _normalized(inputs: list[np.ndarray], params: dict[str, Any]) -> View:
    u, s, vt = _gesvd(inputs[0])
    return _balanced(u, s / s[0] / params["gamma"], vt, params["rank"])


def _scaled(inputs: list[np.ndarray], params: dict[str, Any]) -> View:
    u, s, vt = _gesvd(inputs[0])
    return _balanced(u, s * params["eta"], vt, params["rank"])


def _balanced(u: np.ndarray, weights: np.ndarray, vt: np.ndarray, r: int) -> View:
    square = np.diag(weights[:r])
    return {"B A": -(u[:, :r] * weights[:r]) @ vt[:r], "A A^T": square, "B^T B": square}


def _plain(inputs: list[np.ndarray], params: dict[str, Any]) -> View:
    omega, r = inputs[0], params["rank"]
    return {"0": omega[:, :r].T * (3.0 * len(omega)) ** -0.5, "1": np.zeros((params["out"], r))}


def _directions(a: Any, b: Any, of_a: Any, of_b: Any, params: dict[str, Any], eps: float) -> tuple[Any, Any]:
    if params["reg"] is None:
        return of_a, of_b
    inverses = []
    for gram in (b.T @ b, a @ a.T):
        r = len(gram)
        reg = params["reg"] * (np.trace(gram) / r if params["damping"] == "relative" else 1.0)
        inverses.append(_inverse(gram + (reg + 8.0 * eps * np.trace(gram) + 1e-30) * np.eye(r, dtype=Long)))
    return inverses[0] @ of_a, of_b @ inverses[1]


def _precondition(inputs: list[np.ndarray], params: dict[str, Any], eps: float) -> list[np.ndarray]:
    a, b, of_a, of_b = inputs
    return list(_directions(a, b, of_a, of_b, params, eps))


def _descend(inputs: list[np.ndarray], params: dict[str, Any], eps: float) -> list[np.ndarray]:
    a, b, *rest = inputs
    for _ in range(params["steps"]):
        of_a, of_b = _directions(a, b, *_gradients(a, b, rest, params), params, eps)
        a, b = a - params["rate"] * of_a, b - params["rate"] * of_b
    return [a, b]


def _gradients(a: Any, b: Any, rest: list[np.ndarray], params: dict[str, Any]) -> tuple[Any, Any]:
    if params["loss"] == "linear":
        return rest[0], rest[1]
    residual = b @ a - rest[2]
    return b.T @ residual, residual @ a.T


def _adamw(inputs: list[np.ndarray], params: dict[str, Any], eps: float) -> list[np.ndarray]:
    found = []
    first, second = Long(0.9), Long(0.999)
    for i in range(0, len(inputs), 5):
        values, rest = list(inputs[i : i + 2]), inputs[i + 2 : i + 5]
        means, squares = [0 * x for x in values], [0 * x for x in values]
        for t in range(1, params["steps"] + 1):
            a, b = values
            for side, g in enumerate(_directions(a, b, *_gradients(a, b, rest, params), params, eps)):
                means[side] = first * means[side] + (1 - first) * g
                squares[side] = second * squares[side] + (1 - second) * g**2
                direction = (means[side] / (1 - first**t)) / (np.sqrt(squares[side] / (1 - second**t)) + Long(1e-8))
                decayed = values[side] * (1 - params["rate"] * params["weight_decay"])
                values[side] = decayed - params["rate"] * direction
        found.extend(values)
    return found


def _alignment(inputs: list[np.ndarray], params: dict[str, Any]) -> View:
    x, y, g, a, b = inputs
    angles = scipy.linalg.subspace_angles(x, y)  # descending
    left, right = scipy.linalg.orth(b), scipy.linalg.orth(a.T)
    inside = left @ left.T @ g @ right @ right.T
    energy = np.array(np.sum(inside**2) / np.sum(g**2))
    return {"cosines": np.cos(angles)[::-1], "sines": np.sin(angles), "energy": energy}
