"""The page of one adapter folder: losses, updates, the start, all layers, and the settings."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_one.checkpoint.inspection import Inspection
from lora_one.finetune.metrics import Losses

from .figures import Line, chart, shade
from .html import charts, legend, paragraph, section, table, value, write_document
from .kinds import Series, by_kind, kinds, places
from .measures import ENERGY, GRADIENT, Measure, measures_of_updates, of_start, summary

FLOOR = 1e-6  # of the axes of spectra: what is below is rounding


def write_page(path: Path, inspection: Inspection, losses: Losses) -> None:
    """Write the page of one adapter.

    Raises:
        BackendError: matplotlib is not installed.
        CheckpointError: the page cannot be written.
    """
    layers = inspection.layers
    gradients = {layer.name: layer.start.singular_values for layer in layers if layer.start}
    updates = {layer.name: layer.singular_values for layer in layers}
    marks = legend(kinds(updates))
    shades = paragraph("Below, each line is a layer, from the first one in blue to the last one in orange.")
    at_start = charts(_measured(inspection, (ENERGY, GRADIENT)))
    spectra = charts(_spectra("the gradient", gradients))
    settings = ((name, value(setting)) for name, setting in inspection.settings.items())
    write_document(
        path,
        f"Adapter {inspection.path}",
        [
            *(map(paragraph, inspection.report.summary().splitlines()) if inspection.report else ()),
            table("The adapter as a whole", ("measure", "value"), summary(inspection, losses).items()),
            section("Losses", charts(loss_charts({"": losses}))),
            section(
                "The update s B A",
                *(marks, charts(_measured(inspection, measures_of_updates([inspection])))),
                *(shades, charts(_spectra("the update", updates))),
            ),
            section(
                "The gradient at the start",
                *((marks, at_start) if at_start else ()),
                *((shades, spectra) if spectra else ()),
            ),
            section("Layers", _layers(inspection)),
            section("Settings", table("As the folder has them", ("setting", "value"), settings)),
        ],
    )


def loss_charts(runs: Mapping[str, Losses]) -> list[tuple[str, str]]:
    """Return a chart of the training losses of some runs, and one of their losses on held-out data, with captions."""
    drawn = []
    for title, series, has_marks in (
        ("Training loss", {name: losses.training for name, losses in runs.items()}, False),
        ("Loss on held-out data", {name: losses.held_out for name, losses in runs.items()}, True),
    ):
        ends = [f"{name} from {pairs[0][1]:.4g} to {pairs[-1][1]:.4g}" for name, pairs in series.items() if pairs]
        lines = [Line(pairs, color, color if has_marks else None) for color, pairs in enumerate(series.values())]
        if ends:
            drawn.append((title, chart(f"{title} by step: {', '.join(ends)}", lines, "step", "loss")))
    return drawn


def relative(spectrum: list[float]) -> Series:
    """Return the pairs (i, S_i / S_1) of a spectrum, without zeros."""
    return [(i, s / spectrum[0]) for i, s in enumerate(spectrum, start=1) if s > 0]


def common_limits(spectra: Iterable[list[float]]) -> tuple[float, float]:
    """Return the ends of an axis for all spectra, each over its first value."""
    least = min((values[-1][1] for values in map(relative, spectra)), default=1.0)
    return 0.8 * max(least, FLOOR), 1.25


def _measured(inspection: Inspection, measures: Iterable[Measure]) -> list[tuple[str, str]]:
    """Return a chart for each number of the layers, with a line for each kind, and its caption."""
    drawn = []
    order = kinds(layer.name for layer in inspection.layers)
    for measure in measures:
        series = by_kind({layer.name: measure.number(layer) for layer in inspection.layers})
        lines = [Line(points, order.index(kind), order.index(kind)) for kind, points in series.items()]
        numbers = [number for line in lines for _, number in line.points]
        if numbers:
            label = f"{measure.title}, by layer and kind: from {min(numbers):.3g} to {max(numbers):.3g}"
            drawn.append((measure.title, chart(label, lines, "layer", "", measure.log, measure.limits(numbers))))
    return drawn


def _spectra(what: str, spectra: Mapping[str, list[float]]) -> list[tuple[str, str]]:
    """Return a chart for each kind of layer, with a line for each layer, and its caption."""
    spectra = {name: values for name, values in spectra.items() if values and values[0] > 0}
    where = places(spectra)
    drawn = []
    limits = common_limits(spectra.values())
    for kind in kinds(spectra):
        names = sorted((name for name in spectra if where[name].kind == kind), key=lambda name: where[name].turn)
        lines = [Line(relative(spectra[name]), shade(index, len(names))) for index, name in enumerate(names)]
        last = [line.points[-1][1] for line in lines]
        ends = f"the last is {min(last):.2g} to {max(last):.2g} of the first"
        label = f"Singular values of {what} of {kind} in {len(lines)} layers: {ends}"
        drawn.append((kind, chart(label, lines, "i", "Sᵢ / S₁", log=True, limits=limits)))
    return drawn


def _layers(inspection: Inspection) -> str:
    header = ("layer", "shape", "r", "‖sBA‖", "S_r/S_1", "stable rank", "‖G‖", "energy", "of best", "grown")
    rows = []
    for layer in inspection.layers:
        s = layer.singular_values
        start = [of_start(layer, name) for name in ("gradient_norm", "energy", "share_of_best")]
        rows.append(
            (
                layer.name,
                f"{layer.out_features} x {layer.in_features}",
                str(layer.rank),
                f"{layer.norm:.3g}",
                f"{s[-1] / (s[0] or 1.0):.3f}",
                f"{layer.stable_rank:.2f}",
                *("" if number is None else f"{number:.3g}" for number in start),
                "" if layer.growth is None else f"{layer.growth:.1f}x",
            )
        )
    caption = "‖G‖, energy and of best: of the gradient at the start; grown: ‖sBA‖ over its size at the start"
    return table(caption, header, rows, numbers=True)
