"""Pictures of reports. Needs matplotlib, which only this file imports."""

from pathlib import Path

import numpy as np

from .errors import BackendError
from .report import Report


def plot_report(report: Report, path: str | Path) -> None:
    """Each layer's leading singular values, relative to its first, and the energy that they hold.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise BackendError("plots need matplotlib: pip install 'lora-one[cli]'") from error

    layers = [layer for layer in report.layers if layer.start == "spectral"]
    figure = Figure(figsize=(10, max(3.0, 1.2 + 0.17 * len(layers))), layout="constrained")
    spectra, energies = figure.subplots(1, 2, width_ratios=[1.0, 1.3])

    for index, layer in enumerate(layers):
        s = np.array(layer.singular_values) / layer.singular_values[0]
        shade = 0.15 + 0.75 * index / max(1, len(layers) - 1)
        spectra.semilogy(np.arange(1, len(s) + 1), s, color=(0.1, 0.3, shade), lw=1, alpha=0.7)
    spectra.set(xlabel="i", ylabel="$S_i / S_1$", title="leading singular values of the gradient, a line a layer")
    spectra.grid(alpha=0.3)

    rows = np.arange(len(layers))
    energies.barh(rows, [layer.energy for layer in layers], color="tab:blue", height=0.75)
    energies.set_yticks(rows, [layer.name for layer in layers], fontsize=6)
    energies.invert_yaxis()
    energies.set(xlim=(0, 1), xlabel=r"share of $\|G\|_F^2$", title="energy of the gradient in the factors")
    energies.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
