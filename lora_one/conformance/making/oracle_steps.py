"""The oracle of the steps: factors, preconditioner, both optimizers and alignment, by textbook formulas."""

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from lora_one.conformance.types import View

from .linalg import Inputs, Long, Params, gesvd, inverse

Pair = tuple[np.ndarray, np.ndarray]  # of A and of B


def normalized_factors(inputs: Inputs, params: Params, eps: float) -> View:
    u, s, vt = gesvd(inputs[0])
    return _shared(u, s / s[0] / params["gamma"], vt, params)


def gradient_factors(inputs: Inputs, params: Params, eps: float) -> View:
    u, s, vt = gesvd(inputs[0])
    return _shared(u, s * params["eta"], vt, params)


def _shared(u: np.ndarray, weights: np.ndarray, vt: np.ndarray, params: Params) -> View:
    r = params["rank"]
    return {"B A": -(u[:, :r] * weights[:r]) @ vt[:r]} | _squares(weights[:r], params["balance"])


def _squares(weights: np.ndarray, balance: float) -> View:
    """The factors' Gram matrices. With w the weights of B A, that of A is r^(1 - 2p) w_1 (w / w_1)^(2p)."""
    of_a = len(weights) ** (1.0 - 2.0 * balance) * weights[0] * (weights / weights[0]) ** (2.0 * balance)
    return {"A A^T": np.diag(of_a), "B^T B": np.diag(weights**2 / of_a)}


def plain_factors(inputs: Inputs, params: Params, eps: float) -> View:
    omega, r = inputs[0], params["rank"]
    return {"0": omega[:, :r].T * (3.0 * len(omega)) ** -0.5, "1": np.zeros((params["out"], r))}


def deferred_start(inputs: Inputs, params: Params, eps: float) -> View:
    a, *gradients = inputs
    if a.ndim == 2:
        a, gradients = a[None], [g[None] for g in gradients]
    by_pair = [_deferred(x[0], list(x[1:]), params) for x in zip(a, *gradients, strict=True)]
    view: View = {}
    for step in range(len(gradients)):
        parts = {name: np.stack([pair[step][name] for pair in by_pair]) for name in by_pair[0][step]}
        mean = np.mean(parts["agreement"])
        noise = (1.0 / mean**2 - 1.0) / (step + 1) if mean > 0 else np.inf
        shaped = {name: x if inputs[0].ndim == 3 else x[0] for name, x in parts.items()}
        shaped["settled"] = np.array(float(noise <= 1.0 / 8.0))
        view |= {f"step {step + 1}: {name}": x for name, x in shaped.items()}
    return view


def _deferred(a: np.ndarray, gradients: Inputs, params: Params) -> list[dict[str, np.ndarray]]:
    """What is known of the sum of a pair's gradients, H, of rank r; and the start from it, by step."""
    r, h, agreement, stages = len(a), np.zeros_like(gradients[0]), 0.0, []
    for g in gradients:
        if np.isfinite(g).all() and g.any():
            if not h.any():
                h = g @ scipy.linalg.orth(a.T) @ scipy.linalg.orth(a.T).T
            else:
                u, s, vt = (x[:, :r] if i == 0 else x[:r] for i, x in enumerate(gesvd(h)))
                inside = u.T @ g @ vt.T
                agreement = np.trace(inside * s) / np.linalg.norm(inside) / np.linalg.norm(s)
                full = h + g - (g - u @ (u.T @ g)) @ (np.eye(len(a[0])) - vt.T @ vt)
                u, s, vt = gesvd(full)
                h = (u[:, :r] * s[:r]) @ vt[:r]
        u, s, vt = gesvd(h)
        ratios = s[:r] / (s[0] or 1.0)
        start = h.any()
        squares = _squares(ratios / params["gamma"], params["balance"]) if start else {}
        stages.append(
            {
                "B A": -h / (s[0] or 1.0) / params["gamma"],
                "A A^T": a @ a.T,
                "B^T B": np.zeros((r, r)),
                **squares,
                "S / S_1": ratios,
                "S_1": s[:1] / params["unit"],
                "agreement": np.array(agreement),
            }
        )
    return stages


def precondition(inputs: Inputs, params: Params, eps: float) -> View:
    a, b, gradient_a, gradient_b = _in_long(inputs)
    return _view(_directions((a, b), (gradient_a, gradient_b), params, eps))


def gradient_descent(inputs: Inputs, params: Params, eps: float) -> View:
    a, b, *loss = _in_long(inputs)
    for _ in range(params["steps"]):
        direction_a, direction_b = _directions((a, b), _gradients((a, b), loss, params), params, eps)
        a, b = a - params["rate"] * direction_a, b - params["rate"] * direction_b
    return _view([a, b])


def adamw(inputs: Inputs, params: Params, eps: float) -> View:
    arrays = _in_long(inputs)
    trained = []
    first, second = Long(0.9), Long(0.999)
    for i in range(0, len(arrays), 5):
        values, loss = list(arrays[i : i + 2]), arrays[i + 2 : i + 5]
        means, squares = [0 * x for x in values], [0 * x for x in values]
        for t in range(1, params["steps"] + 1):
            a, b = values
            for side, g in enumerate(_directions((a, b), _gradients((a, b), loss, params), params, eps)):
                means[side] = first * means[side] + (1 - first) * g
                squares[side] = second * squares[side] + (1 - second) * g**2
                direction = (means[side] / (1 - first**t)) / (np.sqrt(squares[side] / (1 - second**t)) + Long(1e-8))
                decayed = values[side] * (1 - params["rate"] * params["weight_decay"])
                values[side] = decayed - params["rate"] * direction
        trained.extend(values)
    return _view(trained)


def _directions(pair: Pair, gradients: Pair, params: Params, eps: float) -> Pair:
    if params["reg"] is None:
        return gradients
    a, b = pair
    inverses = []
    for gram in (b.T @ b, a @ a.T):
        r = len(gram)
        reg = params["reg"] * (np.trace(gram) / r if params["damping"] == "relative" else 1.0)
        inverses.append(inverse(gram + (reg + 8.0 * eps * np.trace(gram) + 1e-30) * np.eye(r, dtype=Long)))
    return inverses[0] @ gradients[0], gradients[1] @ inverses[1]


def _gradients(pair: Pair, loss: Inputs, params: Params) -> Pair:
    if params["loss"] == "linear":
        return loss[0], loss[1]
    a, b = pair
    residual = b @ a - loss[2]
    return b.T @ residual, residual @ a.T


def _in_long(inputs: Inputs) -> list[np.ndarray]:
    return [x.astype(Long) for x in inputs]


def _view(arrays: Sequence[np.ndarray]) -> View:
    return {str(i): x.astype(np.float64) for i, x in enumerate(arrays)}


def alignment(inputs: Inputs, params: Params, eps: float) -> View:
    x, y, g, a, b = inputs
    angles = scipy.linalg.subspace_angles(x, y)  # descending
    left, right = scipy.linalg.orth(b), scipy.linalg.orth(a.T)
    inside = left @ left.T @ g @ right @ right.T
    energy = np.array(np.sum(inside**2) / np.sum(g**2))
    return {"cosines": np.cos(angles)[::-1], "sines": np.sin(angles), "energy": energy}
