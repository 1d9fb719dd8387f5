"""The tables that the command prints: layers of a start, layers of an adapter, results of the conformance suite."""

import itertools
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from lora_one.checkpoint.comparison import Comparison
from lora_one.checkpoint.inspection import Inspection
from lora_one.checks import shown
from lora_one.conformance.report import Conformance, cell
from lora_one.report import LayerReport, Report, rank_bars


def report_table(report: Report) -> Table:
    """Return a table with one row per layer of an initialization."""
    prefix = _common_prefix([layer.name for layer in report.layers])
    columns = ("layer", "shape", "r", "|G|", "S_r/S_1", "energy", "of best")
    table = _table(f"LoRA-One start, layers of {prefix or 'the model'}", columns)
    bars = [[bar] if bar else [] for bar in rank_bars(report)]
    if any(bars):
        table.add_column("ranks", no_wrap=True)
    for layer, bar in zip(report.layers, bars, strict=True):
        name = escape(layer.name[len(prefix) :])
        shape = f"{layer.out_features} x {layer.in_features}"
        if layer.start == "plain":
            table.add_row(name, shape, str(layer.rank), "0", "", "plain LoRA", "", *bar)
            continue
        table.add_row(
            name,
            shape,
            str(layer.rank),
            f"{layer.gradient_norm:.2e}",
            f"{layer.singular_values[-1] / layer.singular_values[0]:.3f}",
            f"{layer.energy:.3f}",
            f"{layer.share_of_best:.3f}",
            *bar,
        )
    return table


def inspection_table(inspection: Inspection) -> Table:
    """Return a table with one row per layer of an adapter on disk."""
    prefix = _common_prefix([layer.name for layer in inspection.layers])
    columns = ("layer", "shape", "r", "|sBA|", "S_r/S_1", "stable", "energy", "grown")
    table = _table(f"{escape(str(inspection.path))}, layers of {prefix or 'the model'}", columns)
    table.caption = "stable: stable rank of sBA; energy: of the gradient at the start; grown: |sBA| over its start"
    table.caption_justify = "left"
    for layer in inspection.layers:
        start = layer.start
        table.add_row(
            escape(layer.name[len(prefix) :]),
            f"{layer.out_features} x {layer.in_features}",
            str(layer.rank),
            f"{layer.norm:.3g}",
            f"{layer.singular_values[-1] / (layer.singular_values[0] or 1.0):.3f}",
            f"{layer.stable_rank:.2f}",
            f"{start.energy:.3f}" if isinstance(start, LayerReport) else "",
            "" if layer.growth is None else f"{layer.growth:.1f}x",
        )
    return table


def differences_table(comparison: Comparison) -> Table:
    """Return a table of the settings in which two adapters differ."""
    names = [escape(str(inspection.path)) for inspection in (comparison.first, comparison.second)]
    table = _table("Settings that differ", ("setting", *names))
    for name, pair in comparison.differences.items():
        table.add_row(name, *(escape("" if value is None else shown(value)) for value in pair))
    return table


def conformance_tables(conformance: Conformance) -> list[Table]:
    """Return the results of the conformance suite, one table per dtype."""
    tables = []
    for dtype in dict.fromkeys(result.dtype for result in conformance.results):
        backends, rows = conformance.rows(dtype)
        table = _table(f"{dtype}: error / allowed", ())
        table.add_column("check")
        for backend in backends:
            table.add_column(backend, justify="right", no_wrap=True)
        for name, results in rows:
            texts = [cell(r) if r is None or r.passed else f"[bold red]{escape(cell(r))}[/]" for r in results]
            table.add_row(name, *texts)
        tables.append(table)
    return tables


def _table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table: its first column is aligned left, the others are aligned right."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    return table


def _common_prefix(names: list[str]) -> str:
    """Return the path that all names begin with, up to a dot. The title shows it once, to save room in the table."""
    parts = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return "".join(f"{level[0]}." for level in shared)
