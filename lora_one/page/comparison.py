"""The page of two adapter folders, side by side."""

from collections.abc import Iterable
from pathlib import Path

from lora_one.checkpoint.comparison import Comparison
from lora_one.checkpoint.inspection import Inspection
from lora_one.finetune.metrics import Losses

from .adapter import common_limits, loss_charts, relative
from .figures import Line, chart
from .html import charts, legend, paragraph, section, table, value, write_document
from .kinds import Series, by_kind, kinds, places
from .measures import ENERGY, GRADIENT, Measure, measures_of_updates, summary


def write_comparison(path: Path, comparison: Comparison, losses: tuple[Losses, Losses]) -> None:
    """Write the page of two adapters.

    Args:
        path: the file to write.
        comparison: the two adapters.
        losses: of the two runs.

    Raises:
        BackendError: matplotlib is not installed.
        CheckpointError: the page cannot be written.
    """
    both = (comparison.first, comparison.second)
    names = [str(inspection.path) for inspection in both]
    marks = legend(names)
    shared = charts(_shared(comparison))
    measured = [
        (measure.title, charts(_measured(both, measure))) for measure in [*measures_of_updates(both), ENERGY, GRADIENT]
    ]
    differences = ((name, *map(value, pair)) for name, pair in comparison.differences.items())
    write_document(
        path,
        f"Adapters {names[0]} and {names[1]}",
        [
            marks,
            table("The two adapters as a whole", ("measure", *names), _summaries(both, losses)),
            section("Settings that differ", table("As the folders have them", ("setting", *names), differences)),
            section("Losses", *_under(marks, charts(loss_charts(dict(zip(names, losses, strict=True)))))),
            section("Spectra of the updates s B A", *_under(marks, charts(_spectra(both)))),
            section("Directions that both updates share", *_under(_about(comparison), shared)),
            *(section(title, *_under(marks, drawn)) for title, drawn in measured),
        ],
    )


def _under(head: str, body: str) -> tuple[str, ...]:
    return (head, body) if body else ()


def _summaries(both: tuple[Inspection, Inspection], losses: tuple[Losses, Losses]) -> list[tuple[str, str, str]]:
    first, second = (summary(*pair) for pair in zip(both, losses, strict=True))
    return [(name, first.get(name, ""), second.get(name, "")) for name in {**first, **second}]


def _about(comparison: Comparison) -> str:
    chance = [max(layer.by_chance_in, layer.by_chance_out) for layer in comparison.layers]
    text = (
        "The mean squared cosine of the principal angles between the two updates of a layer. At 1 they read the same "
        "inputs, or write the same outputs, as far as the smaller rank goes. Two random updates of these ranks would "
        f"be at {max(chance, default=0.0):.2g} or less."
    )
    return paragraph(text) + legend(("inputs", "outputs"))


def _shared(comparison: Comparison) -> list[tuple[str, str]]:
    inputs = by_kind({layer.name: layer.shared_in for layer in comparison.layers})
    outputs = by_kind({layer.name: layer.shared_out for layer in comparison.layers})
    return [
        (kind, _pair(f"Shared directions of {kind}", (inputs[kind], outputs[kind]), ("inputs", "outputs"), (0.0, 1.05)))
        for kind in inputs
    ]


def _measured(both: tuple[Inspection, Inspection], measure: Measure) -> list[tuple[str, str]]:
    """Return a chart of a number for each kind of layer, with a line for each adapter, and its caption."""
    first, second = (by_kind({layer.name: measure.number(layer) for layer in inspection.layers}) for inspection in both)
    names = [str(inspection.path) for inspection in both]
    numbers = [number for series in (first, second) for points in series.values() for _, number in points]
    return [
        (
            kind,
            _pair(
                f"{measure.title} of {kind}",
                (first.get(kind, ()), second.get(kind, ())),
                names,
                measure.limits(numbers),
                measure.log,
            ),
        )
        for kind in dict.fromkeys([*first, *second])
    ]


def _pair(
    title: str,
    series: tuple[Series, Series],
    names: Iterable[str],
    limits: tuple[float, float] | None,
    log: bool = False,
) -> str:
    ranges = [
        f"{name} from {min(number for _, number in points):.3g} to {max(number for _, number in points):.3g}"
        for name, points in zip(names, series, strict=True)
        if points
    ]
    lines = [Line(points, index, index) for index, points in enumerate(series)]
    return chart(f"{title}, by layer: {', '.join(ranges)}", lines, "layer", "", log, limits)


def _spectra(both: tuple[Inspection, Inspection]) -> list[tuple[str, str]]:
    """Return a chart for each kind of layer, with a line for each layer in the colour of its adapter."""
    spectra = [
        {layer.name: layer.singular_values for layer in inspection.layers if layer.norm > 0} for inspection in both
    ]
    where = [places(layers) for layers in spectra]
    drawn = []
    limits = common_limits([values for layers in spectra for values in layers.values()])
    for kind in dict.fromkeys([*kinds(spectra[0]), *kinds(spectra[1])]):
        lines = [
            Line(relative(values), color, color, width=0.7)
            for color in (0, 1)
            for name, values in spectra[color].items()
            if where[color][name].kind == kind
        ]
        label = f"Singular values of {kind}, over the first, in {len(lines)} layers of both"
        drawn.append((kind, chart(label, lines, "i", "Sᵢ / S₁", True, limits)))
    return drawn
