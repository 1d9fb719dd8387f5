"""Figure a: plain LoRA spends its first steps turning A towards the one-step gradient (arXiv 2502.01235, Theorem 3.2).

The linear model, 100 inputs and outputs, 1600 samples, a target of rank 4 with unit singular values, r = 8, gradient
descent at 1/64, from Gaussian A of five variances and B = 0. The angle is the largest principal angle between the
leading 4 directions of A in the input space and those of the gradient at the start. It ends at the angle between the
gradient's directions and the target's own, which 1600 samples leave, not at 0.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lora_one.core.alignment import principal_sines
from lora_one.core.exact import exact_spectrum
from lora_one.core.factors import SYMMETRIC, gradient_factors
from lora_one.core.ops import Array, Ops

from .arrays import Arrays
from .problem import Linear, descend, low_rank, plain_pair, together

VARIANCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
N, RANK, TARGET_RANK = 100, 8, 4


def measure(arrays: Arrays, steps: int = 1500, every: int = 10, seed: int = 0) -> dict[str, Any]:
    """Risk and sine of the angle, each `every` steps, for every start: {name: {"step", "risk", "angle"}}."""
    ops = arrays.ops
    problem = Linear(arrays, low_rank(N, N, np.ones(TARGET_RANK), seed), 1600, seed)
    spectrum = exact_spectrum(ops, problem.gradient(arrays.of(np.zeros((N, N)))), RANK)
    directions = ops.matrix_transpose(spectrum.vt[:TARGET_RANK])  # (in, 4)
    starts = {f"LoRA, variance {v:g}": plain_pair(arrays, N, N, RANK, v, seed) for v in VARIANCES}
    starts["LoRA-One"] = gradient_factors(ops, spectrum, 1.0, SYMMETRIC)
    found: dict[str, Any] = {name: {"step": [], "risk": [], "angle": []} for name in starts}
    path = descend(ops, problem, together(ops, starts.values()), 1 / 64, None, steps)
    for step, (pairs, shifts) in enumerate(path):
        if step % every == 0:
            for index, (rows, risk) in enumerate(zip(found.values(), problem.risk(shifts), strict=True)):
                rows["step"].append(step)
                rows["risk"].append(float(risk))
                rows["angle"].append(angle(ops, pairs.lora_A[index], directions))
    return found


def angle(ops: Ops, lora_A: Array, directions: Array) -> float:
    """Sine of the largest principal angle between the leading right singular vectors of A and `directions`, (in, k)."""
    _, _, vt = ops.svd(lora_A)
    return float(principal_sines(ops, ops.matrix_transpose(vt[: directions.shape[1]]), directions)[0])


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    """Risk and angle against the step."""
    left, right = figure.subplots(1, 2)
    for index, (name, rows) in enumerate(numbers.items()):
        style = {"color": "tab:orange", "lw": 2} if name == "LoRA-One" else {"color": f"{0.15 * index}"}
        left.semilogy(rows["step"], rows["risk"], label=name, **style)
        right.plot(rows["step"], rows["angle"], **style)
    left.set(xlabel="step", ylabel="risk", ylim=(1e-6, None))
    right.set(xlabel="step", ylabel="sine of the largest angle to the gradient", ylim=(0, 1.03))
    left.set_title("Gradient descent at 1/64", fontsize=10)
    right.set_title("A turns towards the first gradient", fontsize=10)
    left.legend(frameon=False, fontsize=8)
