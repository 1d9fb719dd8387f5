"""Figure c: two roads to the minimisers of a problem that can be drawn (arXiv 2502.01235, its phase portrait).

f(x) = (b a) x with a in the plane and b a number: rank-1 LoRA on a weight of two inputs and one output, W = 0. The
target is beta = (2, 1), the data 4 Gaussian points, so the global minimisers are the curve b a = beta, of two branches.
LoRA starts anywhere in the plane b = 0 and first has to turn; the spectral start lies along the gradient.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lora_one.core.exact import exact_spectrum
from lora_one.core.factors import SYMMETRIC, gradient_factors

from .arrays import Arrays
from .problem import Linear, descend, plain_pair, together

BETA = np.array([[2.0, 1.0]])  # (1, 2)
STARTS = 12


def measure(arrays: Arrays, steps: int = 1500, every: int = 10, seed: int = 1) -> dict[str, Any]:
    """Points (a_1, a_2, b) and risks each `every` steps, (steps, STARTS + 1, ...): the last trajectory is the spectral.

    Plain gradient descent at 0.05.
    """
    ops = arrays.ops
    problem = Linear(arrays, BETA, 4, seed)
    spectrum = exact_spectrum(ops, problem.gradient(arrays.of(np.zeros((1, 2)))), 1)
    starts = [plain_pair(arrays, 1, 2, 1, 1.0, seed) for seed in range(STARTS)]
    pairs = together(ops, [*starts, gradient_factors(ops, spectrum, 1.0, SYMMETRIC)])
    points, risks = [], []
    for step, (pair, shift) in enumerate(descend(ops, problem, pairs, 0.05, None, steps)):
        if step % every == 0:
            a, b = arrays.numpy(pair.lora_A)[:, 0], arrays.numpy(pair.lora_B)[:, 0]  # (STARTS + 1, 2), (STARTS + 1, 1)
            points.append(np.concatenate([a, b], axis=1).tolist())
            risks.append(problem.risk(shift).tolist())
    return {"points": points, "risk": risks, "every": every}


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    """The trajectories in the plane of a, and in that of b and a's part along beta."""
    points = np.array(numbers["points"])  # (steps, trajectories, 3)
    length = float(np.linalg.norm(BETA))
    along = points[..., :2] @ BETA[0] / length  # (steps, trajectories)
    left, right = figure.subplots(1, 2)
    left.plot(*np.outer(BETA[0], [-1.7, 1.7]), color="black", lw=1, label="global minimisers")
    b = np.linspace(0.5, 2.2, 100)
    for sign in (1, -1):
        right.plot(sign * length / b, sign * b, color="black", lw=1)
    for axes, x, y in ((left, points[..., 0], points[..., 1]), (right, along, points[..., 2])):
        for index in range(points.shape[1]):
            spectral = index == points.shape[1] - 1
            style = {"color": "tab:orange", "lw": 2.5} if spectral else {"color": "tab:gray", "lw": 1}
            label = "LoRA-One" if spectral else "LoRA" if index == 0 else None
            axes.plot(x[:, index], y[:, index], label=label, **style)
            axes.plot(x[0, index], y[0, index], "o", ms=4, color=style["color"])
    left.set(xlabel="$a_1$", ylabel="$a_2$", xlim=(-3.4, 3.4), ylim=(-2.8, 2.8))
    right.set(xlabel=r"$a \cdot \beta / |\beta|$", ylabel="b", xlim=(-4, 4))
    left.set_title("The plane of a", fontsize=10)
    right.set_title("b, and what a has of the target", fontsize=10)
    left.legend(frameon=False, fontsize=8)
