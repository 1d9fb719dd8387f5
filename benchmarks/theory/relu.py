"""Figure d: the nonlinear case, a layer of ReLU units (arXiv 2502.01235, its section on nonlinear models).

32 inputs and 32 units, a Gaussian weight, a shift of rank 4 with singular values (4, 3, 2, 1) / 4, 1600 samples, r = 4:
LoRA's start (A of PEFT's variance 1/(3 in), B = 0) and the spectral one, each with plain and with preconditioned
gradient descent at 1 (twice that diverges for all four). A unit is active on half of the inputs, so the gradient at the
start is about -D/2, and the spectral start takes a step of 2 along it.
"""

import numpy as np
from matplotlib.figure import Figure

from lora_one.core.exact import exact_spectrum
from lora_one.core.factors import SYMMETRIC, gradient_factors

from .arrays import Arrays
from .problem import Relu, descend, low_rank, plain_pair

N, RANK = 32, 4


def measure(arrays: Arrays, steps: int = 150, seed: int = 0) -> dict[str, list[float]]:
    """The risk at each step: {"LoRA" | "LoRA-One" [", preconditioned"]: [...]}."""
    weight = np.random.default_rng(seed + 1000).standard_normal((N, N)) / np.sqrt(N)
    problem = Relu(arrays, weight, low_rank(N, N, np.array([4.0, 3.0, 2.0, 1.0]) / 4, seed), 1600, seed)
    spectrum = exact_spectrum(arrays.ops, problem.gradient(arrays.of(np.zeros((N, N)))), RANK)
    starts = {
        "LoRA": plain_pair(arrays, N, N, RANK, 1 / (3 * N), seed),
        "LoRA-One": gradient_factors(arrays.ops, spectrum, 2.0, SYMMETRIC),
    }
    return {
        name + label: [float(problem.risk(shift)) for _, shift in descend(arrays.ops, problem, pair, 1.0, reg, steps)]
        for name, pair in starts.items()
        for label, reg in (("", None), (", preconditioned", 1e-3))
    }


def draw(numbers: dict[str, list[float]], figure: Figure) -> None:
    """Risk against the step."""
    axes = figure.subplots()
    for name, risk in numbers.items():
        color = "tab:orange" if name.startswith("LoRA-One") else "tab:gray"
        axes.semilogy(risk, label=name, color=color, ls="-" if name.endswith("preconditioned") else "--")
    axes.set(xlabel="step", ylabel="risk")
    axes.set_title("A layer of ReLU units, gradient descent at 1", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
