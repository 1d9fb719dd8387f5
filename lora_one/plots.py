"""Pictures of reports and of adapters. Needs matplotlib, which only this file imports."""

from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint.inspection import Inspection
from .errors import BackendError, ConfigError
from .files.atomic import replacing_file
from .report import Report


def plot_report(report: Report, path: str | Path) -> None:
    """Each layer's leading singular values, relative to its first, and the energy that they hold.

    Raises:
        BackendError: matplotlib is not installed.
        ConfigError, CheckpointError: no such kind of picture; it cannot be written.
    """
    layers = [layer for layer in report.layers if layer.start == "spectral"]
    figure, left, right = _figure(len(layers))
    _draw_spectra(left, [layer.singular_values for layer in layers])
    left.set(ylabel="$S_i / S_1$", title="leading singular values of the gradient")
    _draw_bars(right, [layer.name for layer in layers], [layer.energy for layer in layers])
    right.set(xlim=(0, 1), xlabel=r"share of $\|G\|_F^2$", title="energy of the gradient in the factors")
    _save(figure, path)


def plot_inspection(found: Inspection, path: str | Path) -> None:
    """An adapter on disk: each layer's singular values of s B A, and their norm.

    Raises:
        BackendError: matplotlib is not installed.
        ConfigError, CheckpointError: no such kind of picture; it cannot be written.
    """
    figure, left, right = _figure(len(found.layers))
    _draw_spectra(left, [layer.singular_values for layer in found.layers])
    left.set(ylabel="$S_i / S_1$", title="singular values of $s B A$")
    _draw_bars(right, [layer.name for layer in found.layers], [layer.norm for layer in found.layers])
    right.set(xlabel=r"$\|s B A\|_F$", title="size of the update")
    _save(figure, path)


def _figure(rows: int) -> tuple[Any, Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise BackendError("plots need matplotlib: pip install 'lora-one[cli]'") from error
    figure = Figure(figsize=(10, max(3.0, 1.2 + 0.17 * rows)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.3])
    return figure, left, right


def _draw_spectra(axes: Any, spectra: list[list[float]]) -> None:
    """A line a layer, the first layers dark and the last ones bright."""
    for index, values in enumerate(spectra):
        if not values[0] > 0:
            continue
        shade = 0.15 + 0.75 * index / max(1, len(spectra) - 1)
        axes.semilogy(np.arange(1, len(values) + 1), np.array(values) / values[0], color=(0.1, 0.3, shade), lw=1)
    axes.set_xlabel("i")
    axes.grid(alpha=0.3)


def _draw_bars(axes: Any, names: list[str], values: list[float]) -> None:
    rows = np.arange(len(names))
    axes.barh(rows, values, color="tab:blue", height=0.75)
    axes.set_yticks(rows, names, fontsize=6)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _save(figure: Any, path: str | Path) -> None:
    with replacing_file(Path(path)) as file:
        try:
            figure.savefig(file, dpi=120)
        except ValueError as error:
            raise ConfigError(f"{path} must end in .png, .pdf or .svg: {error}") from error
