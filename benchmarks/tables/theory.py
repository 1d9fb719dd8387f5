"""Tables of the theory's figures: benchmarks/results/theory.json."""

import numpy as np

from benchmarks.page.markdown import table

from .results import read


def alignment() -> str:
    """Angle to the gradient's directions, and risk, by start."""
    found = read("theory")["alignment"]
    steps = (0, 300, 1500)
    lines = []
    for name, rows in found.items():
        at = [rows["step"].index(step) for step in steps]
        angles = [_small(rows["angle"][i]) for i in at]
        lines.append([name, *angles, *(f"{rows['risk'][i]:.2g}" for i in at)])
    header = ["start", *(f"sine at step {step}" for step in steps), *(f"risk at step {step}" for step in steps)]
    return table(header, lines).strip()


def _small(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.2f}"


def preconditioning() -> str:
    """Risk of the preconditioned descent by start."""
    steps = (0, 10, 50, 100)
    lines = [
        [name, *(f"{risk[step]:.2g}" for step in steps)]
        for name, risk in read("theory")["preconditioning"]["risk"].items()
    ]
    return table(["start", *(f"risk at step {step}" for step in steps)], lines).strip()


def conditioning() -> str:
    """What a step leaves of the error, by condition number."""
    found = read("theory")["preconditioning"]
    lines = [
        [name, *(f"{share:.4f}" for share in found["rate"][key])]
        for name, key in (("with the preconditioner", "preconditioned"), ("without it", "plain"))
    ]
    return table(["a step leaves, at kappa =", *(f"{kappa:g}" for kappa in found["kappa"])], lines).strip()


def portrait() -> str:
    """How long the ways to the minimisers are."""
    found = read("theory")["portrait"]
    points, risk = np.array(found["points"]), np.array(found["risk"])
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=-1).sum(axis=0)  # (trajectories,)
    steps = (risk < 1e-2).argmax(axis=0) * found["every"]
    lines = [
        [name, f"{np.median(lengths[which]):.2f}", f"{np.median(steps[which]):.0f}"]
        for name, which in (("LoRA, median", slice(0, -1)), ("spectral", slice(-1, None)))
    ]
    return table(["start", "length of the way", "steps to a risk of 0.01"], lines).strip()


def relu() -> str:
    """Risk through a ReLU, by start and step."""
    steps = (0, 30, 60, 150)
    lines = [[name, *(f"{risk[step]:.2g}" for step in steps)] for name, risk in read("theory")["relu"].items()]
    return table(["", *(f"risk at step {step}" for step in steps)], lines).strip()
