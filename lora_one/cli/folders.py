"""`lora-one inspect`, `convert` and `merge`: the commands that work on adapter folders."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .bars import bar
from .output import AsJson, output
from .quiet import quiet
from .values import one_of

LAYOUTS = ("peft", "mlx", "flax", "diffusers", "gguf")
Rename = Annotated[list[str] | None, typer.Option(help="OLD=NEW prefix of module paths; may be repeated.")]


def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, of lora-one or of PEFT.")],
    other: Annotated[Path | None, typer.Argument(help="A second folder, to be put beside the first.")] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Where the page goes; default: ADAPTER/inspect.html, for two folders ADAPTER/compare.html."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Where the picture of one folder goes; default: ADAPTER/spectra.png.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in an adapter folder, or in two side by side.

    Prints the spectrum, the energy and the growth of each layer, and writes a page with charts for a browser.
    """
    from lora_one.checkpoint.comparison import compare
    from lora_one.checkpoint.inspection import inspect_adapter
    from lora_one.finetune.metrics import read_losses
    from lora_one.page import write_comparison, write_page

    from .tables import differences_table, inspection_table

    if other is not None and plot is not None:
        raise typer.BadParameter("--plot is for one folder; the page of two has pictures of both")
    with output(as_json) as out, quiet(out.console):
        inspections, losses = [], []
        for folder in (adapter, other):
            if folder is not None:
                with bar(out.console, f"Reading {folder}") as advance:
                    inspections.append(inspect_adapter(folder, advance))
                losses.append(read_losses(folder))
                out.show(inspection_table(inspections[-1]))
        if other is None:
            picture, page = plot or adapter / "spectra.png", page or adapter / "inspect.html"
            with bar(out.console, "Drawing"):
                inspections[0].plot(picture)
                write_page(page, inspections[0], losses[0])
            out.say(f"Picture: {escape(str(picture))}")
            out.values = {**inspections[0].to_dict(), "losses": losses[0]._asdict(), "picture": str(picture)}
        else:
            page = page or adapter / "compare.html"
            with bar(out.console, "Comparing") as advance:
                comparison = compare(inspections[0], inspections[1], advance)
            with bar(out.console, "Drawing"):
                write_comparison(page, comparison, (losses[0], losses[1]))
            out.show(differences_table(comparison))
            out.values = {**comparison.to_dict(), "losses": [run._asdict() for run in losses]}
        out.say(f"Page: {escape(str(page))}")
        out.values["page"] = str(page)


def convert(
    src: Annotated[Path, typer.Argument(help="An adapter folder, of PEFT, mlx-lm or lora-one.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; for gguf the file.")],
    to: Annotated[
        str,
        typer.Option("--to", help="peft, mlx, flax, diffusers or gguf: what opens it.", autocompletion=one_of(LAYOUTS)),
    ],
    rename: Rename = None,
    base: Annotated[
        Path | None, typer.Option(help="For gguf: folder with the base model's config.json; default: the adapter's.")
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(
            help="For diffusers: the pipeline's model, such as unet or transformer.",
            autocompletion=one_of(("unet", "transformer")),
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert an adapter folder to another library's layout."""
    from lora_one.checkpoint.conversion import convert as run

    with output(as_json) as out:
        with bar(out.console, f"Converting {src}"), quiet(out.console):
            run(src, dst, to, _prefixes(rename), base, component)
        out.say(f"Adapter: {escape(str(dst))}")
        out.values = {"adapter": str(dst), "to": to}


def merge(
    model: Annotated[Path, typer.Argument(help="A model folder: config.json and safetensors.")],
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, of lora-one, PEFT or mlx-lm.")],
    out: Annotated[Path, typer.Argument(help="The model folder to make.")],
    rename: Rename = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into a model folder.

    Any library opens the result. No framework is needed.
    """
    from lora_one.checkpoint.merging import merge_folders

    with output(as_json) as written:
        with bar(written.console, "Merging") as advance, quiet(written.console):
            merge_folders(model, adapter, out, _prefixes(rename), advance)
        written.say(f"Model: {escape(str(out))}")
        written.values = {"model": str(out)}


def _prefixes(rename: list[str] | None) -> dict[str, str]:
    pairs = [name.partition("=") for name in rename or ()]
    if not all(equals for _, equals, _ in pairs):
        raise typer.BadParameter(f"--rename must be OLD=NEW, got {' '.join(rename or ())}")
    return {old: new for old, _, new in pairs}
