"""The `lora-one` command."""

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

from lora_one.errors import LoraOneError

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ModuleNotFoundError as error:
    sys.exit(f"the lora-one command needs the package {error.name!r}: pip install 'lora-one[cli]'")

from lora_one.files.atomic import write_whole

from .options import INIT_OPTIONS, OPTIONS, Setting, recipe_from, takes
from .quiet import VERBOSE, is_verbose, quiet

app = typer.Typer(help="LoRA-One: a better starting point for LoRA fine-tuning.", no_args_is_help=True)
console = Console(highlight=False)


@app.command()
@takes(OPTIONS)
def finetune(config: Path | None, verbose: bool, **settings: Setting) -> None:
    """Fine-tune a model with LoRA-One. Without arguments: the embedded model on the embedded task."""
    from lora_one.finetune.job import finetune as run

    from .progress import Terminal

    recipe = recipe_from(config, settings)
    with Terminal(console, recipe, verbose) as terminal:
        outcome = run(recipe, terminal)
    terminal.finish(outcome)


@app.command()
@takes(INIT_OPTIONS)
def init(config: Path | None, verbose: bool, **settings: Setting) -> None:
    """Start LoRA and save the adapter, for a trainer of your own."""
    from lora_one.finetune.job import initialize_only

    from .progress import Terminal

    recipe = recipe_from(config, settings)
    with Terminal(console, recipe, verbose) as terminal:
        outcome = initialize_only(recipe, terminal)
    terminal.finish(outcome)


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, of lora-one or of PEFT.")],
    plot: Annotated[Path | None, typer.Option(help="Where the picture goes; default: ADAPTER/spectra.png.")] = None,
) -> None:
    """Show an adapter's spectra and energy, as a table and as a picture."""
    from lora_one.checkpoint.inspection import inspect_adapter

    from .tables import inspection_table

    picture = plot or adapter / "spectra.png"
    with quiet(console):
        inspection = inspect_adapter(adapter)
        console.print(inspection_table(inspection))
        inspection.plot(picture)
    console.print(f"Picture: {picture}", soft_wrap=True)


@app.command()
def conformance(
    backend: Annotated[str | None, typer.Option("--backend", help="numpy, torch, jax or mlx; default: all.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, gpu, ...")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, float64 or bfloat16; default: all.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the results go, as JSON.")] = None,
) -> None:
    """Check that the frameworks on this machine give the same numbers as the spec."""
    from lora_one.conformance import check_installed

    from .tables import conformance_tables

    with console.status("") as status, quiet(console):
        result = check_installed(backend, device, dtype, status.update)
    for table in conformance_tables(result):
        console.print(table)
    for line in [*result.explain_failures().splitlines(), *result.notes]:
        console.print(escape(line), soft_wrap=True)
    console.print(f"[bold {'green' if result.passed else 'red'}]{escape(result.verdict)}[/]", soft_wrap=True)
    if json_file:
        write_whole(json_file, json.dumps(result.to_dict(), indent=1) + "\n")
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def estimate(
    model: Annotated[Path, typer.Option("--model", help="Folder with a config.json; no weights are needed.")],
    rank: Annotated[int, typer.Option("--rank", "-r")] = 8,
    rank_max: Annotated[int | None, typer.Option("--rank-max", help="Of a layer, where ranks differ.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a sequence.")] = 2048,
    init_batches: Annotated[int, typer.Option("--init-batches")] = 8,
    dtype: Annotated[str, typer.Option("--dtype")] = "bfloat16",
    quantized: Annotated[bool, typer.Option("--quantized", help="4-bit base weights.")] = False,
    attention: Annotated[str, typer.Option("--attention", help="sdpa or eager.")] = "sdpa",
    checkpointing: Annotated[bool, typer.Option("--checkpointing")] = False,
    precondition: Annotated[bool, typer.Option("--precondition")] = False,
    targets: Annotated[str, typer.Option("--targets", help='"all-linear", or names with commas.')] = "all-linear",
    passes: Annotated[int, typer.Option("--passes", help="Over the batches of init.")] = 1,
    oversample: Annotated[int, typer.Option("--oversample")] = 16,
    hardware: Annotated[str | None, typer.Option("--hardware", help="H100, ...; default: this CPU, measured.")] = None,
    tflops: Annotated[float | None, typer.Option("--tflops", help="Peak in the dtype.")] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", help="GB/s.")] = None,
    efficiency: Annotated[float | None, typer.Option("--efficiency", help="Share of the peak, 0 to 1.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Estimate the memory and time of an init and of a training step, from config.json alone."""
    from lora_one.config import Config
    from lora_one.estimate import Workload, read_architecture
    from lora_one.estimate import estimate as run
    from lora_one.estimate.rates.choice import choose
    from lora_one.estimate.table import as_text

    names = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    work = Workload(
        batch_size=batch_size,
        seq_len=seq_len,
        init_batches=init_batches,
        dtype=dtype,
        quantized=quantized,
        attention=attention,
        checkpointing=checkpointing,
        precondition=precondition,
        config=Config(rank=rank, rank_max=rank_max, passes=passes, oversample=oversample, targets=names),
    )
    with quiet(console):
        result = run(read_architecture(model), work, choose(hardware, tflops, bandwidth, efficiency, dtype))
    text = json.dumps(result.to_dict(), indent=1) if as_json else as_text(result)
    console.print(text, soft_wrap=True, markup=False)


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="An adapter folder, of PEFT, mlx-lm or lora-one.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; for gguf the file.")],
    to: Annotated[str, typer.Option("--to", help="peft, mlx, flax, diffusers or gguf: what opens it.")],
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW prefix of module paths; may be repeated.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="For gguf: folder with the base model's config.json; default: the adapter's.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="For diffusers: the pipeline's model, such as unet or transformer.")
    ] = None,
) -> None:
    """Convert an adapter folder to the layout that another library opens."""
    from lora_one.checkpoint.conversion import convert as run

    with quiet(console):
        run(src, dst, to, _prefixes(rename), base, component)
    console.print(f"Adapter: {dst}", soft_wrap=True)


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="A model folder: config.json and safetensors.")],
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, of lora-one, PEFT or mlx-lm.")],
    out: Annotated[Path, typer.Argument(help="The model folder to make.")],
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW prefix of module paths; may be repeated.")] = None,
) -> None:
    """Merge an adapter into a model folder, which any library opens. Needs no framework."""
    from lora_one.checkpoint.merging import merge_folders

    with quiet(console):
        merge_folders(model, adapter, out, _prefixes(rename))
    console.print(f"Model: {out}", soft_wrap=True)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show which frameworks and devices work here, and what each missing one is for. Fails if one is broken."""
    from lora_one.doctor.examination import describe, examine

    with quiet(console):
        examination = examine()
    if as_json:
        typer.echo(json.dumps(examination.to_dict(), indent=1))
    else:
        console.print(escape(describe(examination)), soft_wrap=True)
    if any(part.state == "broken" for part in examination.parts):
        raise typer.Exit(1)


def _prefixes(rename: list[str] | None) -> dict[str, str]:
    pairs = [name.partition("=") for name in rename or ()]
    if not all(equals for _, equals, _ in pairs):
        raise typer.BadParameter(f"--rename must be OLD=NEW, got {' '.join(rename or ())}")
    return {old: new for old, _, new in pairs}


def main() -> None:
    """Run the command. Errors become messages instead of tracebacks, and Ctrl-C exits with status 130."""
    try:
        app()
    except LoraOneError as error:
        _fail(str(error))
    except SystemExit as stop:
        raise SystemExit(130 if _interrupted(stop) else stop.code) from None
    except Exception as error:  # a bug in this library or in another one
        if is_verbose() or "--verbose" in sys.argv:
            traceback.print_exception(error)
        _fail(f"unexpected {type(error).__name__}: {error} ({VERBOSE}=1 shows where)")


def _fail(text: str) -> NoReturn:
    console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    sys.exit(1)


def _interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C ended the command. Typer turns it into an exit status of 1."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
