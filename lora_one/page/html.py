"""The parts of a page: its head with the style, sections, tables, and charts with their captions."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lora_one.checks import shown
from lora_one.files.atomic import write_whole

from .figures import GLYPHS, SERIES

STYLE = Path(__file__).with_name("style.css")


def write_document(path: Path, title: str, sections: Iterable[str]) -> None:
    """Write a page: one file that holds its style and its charts."""
    write_whole(
        path,
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{"".join(sections)}</main>
</body>
</html>
""",
    )


def section(title: str, *parts: str) -> str:
    """Return a section with a heading; nothing if it has no parts."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Return a table that scrolls within its own box. The first cell of a row is the row's header.

    Args:
        numbers: the cells are numbers, which are aligned on the right.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>\n'
        for first, *cells in rows
    )
    if not body:
        return ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        f"<table{' class=numbers' if numbers else ''}>\n"
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>"
    )


def charts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return charts beside one another, each with its caption. Pairs are (caption, SVG)."""
    figures = "".join(
        f"<figure>\n<figcaption>{escape(caption)}</figcaption>\n{svg}\n</figure>\n" for caption, svg in pairs
    )
    return f'<div class="charts">\n{figures}</div>' if figures else ""


def legend(names: Iterable[str]) -> str:
    """Return the names of lines in the order of the page's colours, each with its mark."""
    items = "".join(
        f'<li><span aria-hidden="true" style="color:var(--s{index % len(SERIES)})">'
        f"{GLYPHS[index % len(GLYPHS)]}</span> {escape(name)}</li>"
        for index, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def value(setting: Any) -> str:
    """Return the value of a setting as text; nothing for one that is not there."""
    if setting is None:
        return ""
    if isinstance(setting, list | tuple) and all(isinstance(item, str) for item in setting):
        return ", ".join(setting)
    if isinstance(setting, float):
        return f"{setting:.6g}"
    return setting if isinstance(setting, str) else shown(setting)
