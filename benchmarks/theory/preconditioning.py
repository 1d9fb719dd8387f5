"""Figure b: preconditioned descent converges linearly from the spectral start, whatever the condition number.

Left: the linear model of figure a with target singular values (4, 3, 2, 1) / 4, r = 4, preconditioned descent at 0.5
with reg = 1e-3, from four starts. Two add -B0 A0 to the base weight, as LoRA-GA does, and take orthonormal singular
vectors of the gradient: LoRA-One's choice, the leading r on both sides, and LoRA-GA's, the leading r for A and the next
for B. With the base corrected, B A has to reach D + B0 A0. By LoRA-One's choice its columns span the r leading
directions, and rank r is enough. By LoRA-GA's they span 2 r, and the rows those of D and those of A0, the gradient's,
which agree up to the sampling error of the inputs only: rank r is not enough, and the risk stalls.

Right: the factor by which the error falls in a step, from the spectral start, against the condition number of D. reg is
1e-10 here: damping above the smallest eigenvalue of B^T B would itself bring the condition number back.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lora_one.core.exact import exact_spectrum
from lora_one.core.factors import SYMMETRIC, Factors, gradient_factors, normalized_factors

from .arrays import Arrays
from .problem import Linear, descend, low_rank, product

N, RANK = 100, 4
KAPPAS = (1.0, 10.0, 100.0, 1e3, 1e4)
LEARNING_RATE = 0.5


def measure(arrays: Arrays, seed: int = 0) -> dict[str, Any]:
    """{"risk": {start: risk at each step}, "rate": {"preconditioned" | "plain": a factor for each kappa}}."""
    problem = Linear(arrays, low_rank(N, N, np.array([4.0, 3.0, 2.0, 1.0]) / 4, seed), 1600, seed)
    risks = {
        name: [
            float(problem.risk(shift))
            for _, shift in descend(arrays.ops, problem, pair, LEARNING_RATE, 1e-3, 100, correction)
        ]
        for name, (pair, correction) in starts(arrays, problem).items()
    }
    rates = {
        name: [contraction(arrays, kappa, reg, seed) for kappa in KAPPAS]
        for name, reg in (("preconditioned", 1e-10), ("plain", None))
    }
    return {"risk": risks, "kappa": list(KAPPAS), "rate": rates}


def starts(arrays: Arrays, problem: Linear) -> dict[str, tuple[Factors, Any]]:
    """The four starts of the left half: the pair, and what is added to the base weight."""
    ops = arrays.ops
    gradient = problem.gradient(arrays.of(np.zeros((N, N))))
    spectrum = exact_spectrum(ops, gradient, RANK)
    more = exact_spectrum(ops, gradient, 2 * RANK)
    lora_one = Factors(more.vt[:RANK], more.u[:, :RANK])
    lora_ga = Factors(more.vt[:RANK], more.u[:, RANK:])  # its default, "ArB2r"
    return {
        "spectral": (gradient_factors(ops, spectrum, 1.0, SYMMETRIC), 0.0),
        "LoRA-One, gamma = 128": (normalized_factors(ops, spectrum, 128.0, SYMMETRIC), 0.0),
        "LoRA-One's vectors, base corrected": (lora_one, -product(ops, lora_one)),
        "LoRA-GA's vectors, base corrected": (lora_ga, -product(ops, lora_ga)),
    }


def contraction(arrays: Arrays, kappa: float, reg: float | None, seed: int, steps: int = 200) -> float:
    """The mean factor of ||C - D||_F over the last 20 steps before it falls under 1e-11 of ||D||_F, or before the end.

    D has the singular values 1, 1, 1/kappa, 1/kappa: long before 200 steps only the small ones are left to learn.
    """
    target = low_rank(N, N, np.array([1.0, 1.0, 1.0 / kappa, 1.0 / kappa]), seed)
    problem = Linear(arrays, target, 1600, seed)
    spectrum = exact_spectrum(arrays.ops, problem.gradient(arrays.of(np.zeros((N, N)))), RANK)
    start = gradient_factors(arrays.ops, spectrum, 1.0, SYMMETRIC)
    errors: list[float] = []
    for _, shift in descend(arrays.ops, problem, start, LEARNING_RATE, reg, steps):
        errors.append(float(arrays.norm(shift - problem.target)) / float(np.linalg.norm(target)))
        if errors[-1] < 1e-11:
            break
    return (errors[-1] / errors[-21]) ** (1 / 20)


def draw(numbers: dict[str, Any], figure: Figure) -> None:
    """Risk against the step; one minus the factor against kappa."""
    left, right = figure.subplots(1, 2)
    colors = ("tab:orange", "tab:red", "tab:blue", "tab:gray")
    for (name, risk), color in zip(numbers["risk"].items(), colors, strict=True):
        left.semilogy(risk, label=name, color=color)
    left.set(xlabel="step", ylabel="risk")
    left.set_title("Preconditioned descent at 0.5", fontsize=10)
    for name, color in (("preconditioned", "tab:orange"), ("plain", "tab:gray")):
        right.loglog(numbers["kappa"], 1 - np.array(numbers["rate"][name]), "o-", label=name, color=color)
    right.set(xlabel="condition number of the target", ylabel="1 - (error after a step / before)")
    right.set_title("What a step takes off the error", fontsize=10)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
