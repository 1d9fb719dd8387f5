"""Charts as SVG inside a page, drawn with matplotlib. Their colours are the page's, so that they follow its theme."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from lora_one.errors import BackendError

from .kinds import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that are drawn with -> what the page has in their places: see style.css in `html`.
INK, GRID = "#010203", "#010204"
SERIES = tuple(f"#0a0b{index:02x}" for index in range(8))
_THEME = {INK: "currentColor", GRID: "var(--grid)"} | {color: f"var(--s{i})" for i, color in enumerate(SERIES)}
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")  # the marks, for a legend
FIRST, LAST = (0x3B, 0x7D, 0xD8), (0xD9, 0x70, 0x2E)  # of the first and the last layer: seen on white and on black


class Line(NamedTuple):
    """One line of a chart.

    Attributes:
        points: pairs of a place and a number.
        color: the number of a colour of the page, or a colour.
        mark: the number of a mark at each point; None for none.
        width: of the line.
    """

    points: Series
    color: int | str = 0
    mark: int | None = None
    width: float = 1.0


def chart(
    label: str, lines: Sequence[Line], x: str, y: str, log: bool = False, limits: tuple[float, float] | None = None
) -> str:
    """Return a chart as an SVG element.

    Args:
        label: what a reader who cannot see it is told.
        lines: what is drawn.
        x, y: the labels of the axes.
        log: whether the vertical axis is logarithmic.
        limits: of the vertical axis; None fits them to the lines.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise BackendError("the page's charts need matplotlib: pip install 'lora-one[cli]'") from error
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9.5}):
        figure = Figure(figsize=(3.3, 2.5))
        axes = figure.add_axes((0.18, 0.2, 0.78, 0.76))
        _draw(axes, lines)
        axes.set_xlabel(x, labelpad=0)
        axes.set_ylabel(y)
        if log and any(value > 0 for line in lines for _, value in line.points):
            axes.set_yscale("log")
        if limits is not None:
            axes.set_ylim(*limits)
        _theme(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _element(file.getvalue(), label)


def shade(index: int, count: int) -> str:
    """Return the colour of a layer between those of the first one and of the last one."""
    share = index / max(1, count - 1)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(FIRST, LAST, strict=True))


def _draw(axes: "Axes", lines: Sequence[Line]) -> None:
    for line in lines:
        color = SERIES[line.color % len(SERIES)] if isinstance(line.color, int) else line.color
        mark = "" if line.mark is None else MARKS[line.mark % len(MARKS)]
        xs, ys = zip(*line.points, strict=True) if line.points else ((), ())
        axes.plot(xs, ys, color=color, marker=mark, markersize=3, markeredgewidth=0, linewidth=line.width)


def _theme(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=2)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _element(text: str, label: str) -> str:
    """Return matplotlib's file as an element of a page: no header, no fixed size, the page's colours, a label."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # of which a page would have many with one name
    for color, own in _THEME.items():
        text = text.replace(color, own)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip()
