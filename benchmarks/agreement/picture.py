"""The picture of a measurement: losses on top of each other, and their differences below."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

STYLES = {
    "torch float64": ("black", "-", 5.0),
    "jax float64": ("silver", "-", 3.5),
    "torch float32": ("tab:orange", "-", 2.2),
    "jax float32": ("tab:blue", "--", 1.6),
    "mlx float32": ("tab:green", ":", 1.6),
}


def draw(measured: dict[str, Any], path: Path) -> None:
    """A column a model. Differences are relative to PyTorch in float64."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, len(measured), sharex=True, squeeze=False)
    for (model, found), (above, below) in zip(measured.items(), axes.T, strict=True):
        losses = {name: np.array(each) for name, each in found["losses"].items()}
        exact = losses["torch float64"]
        steps = np.arange(1, len(exact) + 1)
        for name, (color, line, width) in STYLES.items():
            above.plot(steps, losses[name], color=color, ls=line, lw=width, label=name)
            if name != "torch float64":
                below.semilogy(steps, _visible(losses[name], exact), color=color, ls=line, lw=1.4, label=name)
        for index, each in enumerate(found["perturbed"]["losses"]):
            label = "torch float32, weights moved by an eps" if index == 0 else None
            below.semilogy(steps, _visible(np.array(each), exact), color="tab:red", lw=0.7, alpha=0.6, label=label)
        below.axhline(1e-4, color="gray", lw=0.8)
        above.set(title=f"{model} model", ylabel="training loss")
        below.set(xlabel="step", ylabel="relative difference from torch float64", ylim=(5e-18, 1e-3))
    axes[0, 0].legend(frameon=False, loc="upper right")
    axes[1, 0].legend(frameon=False, fontsize=8, loc="center right")
    for each in axes.flat:
        each.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def _visible(losses: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Relative differences; one of 0 is drawn at the bottom, since a log axis has none."""
    return np.maximum(np.abs(losses - exact) / exact, 1e-17)
