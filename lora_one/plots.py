"""Pictures of spectra, drawn from plain lists with matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .errors import BackendError, ConfigError
from .files.atomic import replacing_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Panel(NamedTuple):
    """The title of a panel, and the label of the axis that shows its numbers."""

    title: str
    label: str


def draw(
    path: str | Path,
    names: list[str],
    spectra: list[list[float]],
    sizes: list[float],
    panels: tuple[Panel, Panel],
    limit: float | None = None,
) -> None:
    """Draw each layer's singular values, relative to the largest, beside one number per layer.

    Args:
        path: image file to write; its suffix chooses the format.
        names: the layers' names.
        spectra: the singular values of each layer, descending.
        sizes: one number per layer.
        panels: titles and labels of the spectra and of the numbers.
        limit: the largest possible number; None if there is no limit.

    Raises:
        BackendError: matplotlib is not installed.
        ConfigError: the suffix of `path` is not an image format.
        CheckpointError: the picture cannot be written.
    """
    figure, left, right = _figure(len(names))
    _draw_spectra(left, spectra)
    left.set(title=panels[0].title, ylabel=panels[0].label)
    _draw_bars(right, names, sizes)
    right.set(title=panels[1].title, xlabel=panels[1].label)
    if limit is not None:
        right.set(xlim=(0, limit))
    _save(figure, path)


def _figure(rows: int) -> "tuple[Figure, Axes, Axes]":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise BackendError("plots need matplotlib: pip install 'lora-one[cli]'") from error
    figure = Figure(figsize=(10, max(3.0, 1.2 + 0.17 * rows)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.3])
    return figure, left, right


def _draw_spectra(axes: "Axes", spectra: list[list[float]]) -> None:
    """Draw one line per layer, the first layers dark and the last ones bright."""
    for index, values in enumerate(spectra):
        if not values[0] > 0:
            continue
        shade = 0.15 + 0.75 * index / max(1, len(spectra) - 1)
        axes.semilogy(np.arange(1, len(values) + 1), np.array(values) / values[0], color=(0.1, 0.3, shade), lw=1)
    axes.set_xlabel("i")
    axes.grid(alpha=0.3)


def _draw_bars(axes: "Axes", names: list[str], values: list[float]) -> None:
    rows = np.arange(len(names))
    axes.barh(rows, values, color="tab:blue", height=0.75)
    axes.set_yticks(rows, names, fontsize=6)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _save(figure: "Figure", path: str | Path) -> None:
    with replacing_file(Path(path)) as file:
        try:
            figure.savefig(file, dpi=120)
        except ValueError as error:
            raise ConfigError(f"{path} must end in .png, .pdf or .svg: {error}") from error
