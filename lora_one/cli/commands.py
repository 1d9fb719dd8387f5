"""The `lora-one` command."""

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

from lora_one.errors import LoraOneError

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ModuleNotFoundError as error:
    sys.exit(f"the lora-one command needs the package {error.name!r}: pip install 'lora-one[cli]'")

from lora_one.files.atomic import write_whole
from lora_one.finetune.recipe import Recipe, make_recipe, read_recipe

from .quiet import VERBOSE, is_verbose, quiet

app = typer.Typer(help="LoRA-One: start LoRA where an epoch of training would get to.", no_args_is_help=True)
console = Console(highlight=False)

# The options of a recipe. None means "not given", so that a configuration file's value, or the default, holds.
ModelOption = Annotated[str | None, typer.Option("--model", help="Folder of a causal language model.")]
DataOption = Annotated[str | None, typer.Option("--data", help="JSON Lines, or a folder with train.jsonl.")]
TestOption = Annotated[str | None, typer.Option("--test", help="Held-out JSON Lines: exact match before and after.")]
BackendOption = Annotated[str | None, typer.Option("--backend", help="torch, ...")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="Of the base weights: float32, bfloat16, float16.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cuda, cpu, ...")]
RankOption = Annotated[int | None, typer.Option("--rank", "-r")]
AlphaOption = Annotated[float | None, typer.Option("--alpha")]
GammaOption = Annotated[str | None, typer.Option("--gamma", help='A number, or "auto".')]
TargetsOption = Annotated[str | None, typer.Option("--targets", help='"all-linear", names with commas, or a regex.')]
GradientOption = Annotated[str | None, typer.Option("--gradient", help="sketch or exact.")]
PassesOption = Annotated[str | None, typer.Option("--passes", help='Of the sketch: a number, or "auto", 4 to 12.')]
InitBatchesOption = Annotated[int | None, typer.Option("--init-batches", help="Batches that the start reads.")]
BatchSizeOption = Annotated[int | None, typer.Option("--batch-size")]
MaxLengthOption = Annotated[int | None, typer.Option("--max-length", help="Tokens that sequences are cut to.")]
SeedOption = Annotated[int | None, typer.Option("--seed")]
OutOption = Annotated[str | None, typer.Option("--out", help="Folder for the adapter.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML or TOML with any of these settings.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show what other libraries say, and tracebacks.")]


@app.command()
def finetune(
    model: ModelOption = None,
    data: DataOption = None,
    test: TestOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    rank: RankOption = None,
    alpha: AlphaOption = None,
    gamma: GammaOption = None,
    targets: TargetsOption = None,
    gradient: GradientOption = None,
    passes: PassesOption = None,
    init_batches: InitBatchesOption = None,
    steps: Annotated[int | None, typer.Option("--steps")] = None,
    batch_size: BatchSizeOption = None,
    max_length: MaxLengthOption = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr")] = None,
    precondition: Annotated[bool | None, typer.Option("--precondition/--no-precondition")] = None,
    plain: Annotated[bool | None, typer.Option("--plain", help="LoRA's usual start, for comparison.")] = None,
    evaluate: Annotated[bool | None, typer.Option(help="Run the benchmarks that --config names.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each benchmark at most.")] = None,
    allow_code_execution: Annotated[
        bool | None, typer.Option("--allow-code-execution", help="Let benchmarks run the code that the model writes.")
    ] = None,
    save_every: Annotated[int | None, typer.Option("--save-every", help="Steps between checkpoints.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the last checkpoint in --out, if there is one.")
    ] = None,
    seed: SeedOption = None,
    out: OutOption = None,
    config: ConfigOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Fine-tune a model with LoRA-One. Without arguments: the embedded model on the embedded task."""
    from lora_one.finetune.job import finetune as run

    from .progress import Terminal

    recipe = _recipe(config, locals())
    with Terminal(console, recipe, verbose) as terminal:
        outcome = run(recipe, terminal)
    terminal.finish(outcome)


@app.command()
def init(
    model: ModelOption = None,
    data: DataOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    rank: RankOption = None,
    alpha: AlphaOption = None,
    gamma: GammaOption = None,
    targets: TargetsOption = None,
    gradient: GradientOption = None,
    passes: PassesOption = None,
    init_batches: InitBatchesOption = None,
    batch_size: BatchSizeOption = None,
    max_length: MaxLengthOption = None,
    seed: SeedOption = None,
    out: OutOption = None,
    config: ConfigOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Start LoRA and save the adapter, for a trainer of your own."""
    from lora_one.finetune.job import initialize_only

    from .progress import Terminal

    recipe = _recipe(config, locals())
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

    from .progress import inspection_table

    picture = plot or adapter / "spectra.png"
    with quiet(console):
        found = inspect_adapter(adapter)
        console.print(inspection_table(found))
        found.plot(picture)
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

    from .progress import conformance_tables

    with console.status("") as status, quiet(console):
        found = check_installed(backend, device, dtype, status.update)
    for table in conformance_tables(found):
        console.print(table)
    for line in [*found.explain_failures().splitlines(), *found.notes]:
        console.print(escape(line), soft_wrap=True)
    console.print(f"[bold {'green' if found.passed else 'red'}]{escape(found.verdict)}[/]", soft_wrap=True)
    if json_file:
        write_whole(json_file, json.dumps(found.to_dict(), indent=1) + "\n")
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def estimate(
    model: Annotated[Path, typer.Option("--model", help="Folder with a config.json; no weights are needed.")],
    rank: Annotated[int, typer.Option("--rank", "-r")] = 8,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a sequence.")] = 2048,
    init_batches: Annotated[int, typer.Option("--init-batches")] = 8,
    dtype: Annotated[str, typer.Option("--dtype")] = "bfloat16",
    quantized: Annotated[bool, typer.Option("--quantized", help="4-bit base weights.")] = False,
    attention: Annotated[str, typer.Option("--attention", help="sdpa or eager.")] = "sdpa",
    checkpointing: Annotated[bool, typer.Option("--checkpointing")] = False,
    precondition: Annotated[bool, typer.Option("--precondition")] = False,
    targets: Annotated[str, typer.Option("--targets", help='"all-linear", or names with commas.')] = "all-linear",
    passes: Annotated[int, typer.Option("--passes", help="Of the sketch; flat gradients take up to 12.")] = 4,
    oversample: Annotated[int, typer.Option("--oversample")] = 16,
    hardware: Annotated[str | None, typer.Option("--hardware", help="H100, ...; default: this CPU, measured.")] = None,
    tflops: Annotated[float | None, typer.Option("--tflops", help="Peak in the dtype.")] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", help="GB/s.")] = None,
    efficiency: Annotated[float | None, typer.Option("--efficiency", help="Share of the peak, 0 to 1.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Say what an init and a training step will take, from config.json alone."""
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
        config=Config(rank=rank, passes=passes, oversample=oversample, targets=names),
    )
    with quiet(console):
        found = run(read_architecture(model), work, choose(hardware, tflops, bandwidth, efficiency, dtype))
    text = json.dumps(found.to_dict(), indent=1) if as_json else as_text(found)
    console.print(text, soft_wrap=True, markup=False)


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="An adapter folder, of PEFT, mlx-lm or lora-one.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Annotated[str, typer.Option("--to", help="peft, mlx or flax: the library that is to open it.")],
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW prefix of module paths; may be repeated.")] = None,
) -> None:
    """Write an adapter folder again, in the layout that another library opens."""
    from lora_one.checkpoint.conversion import convert as run

    pairs = [name.partition("=") for name in rename or ()]
    if not all(equals for _, equals, _ in pairs):
        raise typer.BadParameter(f"--rename must be OLD=NEW, got {' '.join(rename or ())}")
    with quiet(console):
        run(src, dst, to, {old: new for old, _, new in pairs})
    console.print(f"Adapter: {dst}", soft_wrap=True)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say which frameworks and devices work here, and what each missing piece would give. Fails if one is broken."""
    from lora_one.doctor.examination import describe, examine

    with quiet(console):
        found = examine()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        console.print(escape(describe(found)), soft_wrap=True)
    if any(part.state == "broken" for part in found.parts):
        raise typer.Exit(1)


def _recipe(config: Path | None, arguments: dict[str, Any]) -> Recipe:
    """The file's settings, with what was given on the command line over them."""
    # The callers' locals also hold what they imported, and None where an option was not given.
    given: dict[str, Any] = {n: v for n, v in arguments.items() if isinstance(v, (str, int, float, bool))}
    for name, number in (("gamma", float), ("passes", int)):
        if given.get(name, "auto") != "auto":
            try:
                given[name] = number(given[name])
            except ValueError:
                raise typer.BadParameter(f'--{name} must be a number or "auto", got {given[name]!r}') from None
    if "," in given.get("targets", "") and not any(c in given["targets"] for c in "()[]{}*+?|\\"):
        given["targets"] = [name.strip() for name in given["targets"].split(",")]
    if "steps" in given:
        given["epochs"] = None  # what was given here holds, and not the file's
    return make_recipe({**(read_recipe(config) if config else {}), **given})


def main() -> None:
    """Run the command; an error is a message, not a traceback, and Ctrl-C is exit status 130."""
    try:
        app()
    except LoraOneError as error:
        _fail(str(error))
    except SystemExit as stop:
        raise SystemExit(130 if _interrupted(stop) else stop.code) from None
    except Exception as error:  # a mistake of ours, or of a library's
        if is_verbose() or "--verbose" in sys.argv:
            traceback.print_exception(error)
        _fail(f"unexpected {type(error).__name__}: {error} ({VERBOSE}=1 shows where)")


def _fail(text: str) -> NoReturn:
    console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    sys.exit(1)


def _interrupted(error: BaseException | None) -> bool:
    """Whether it was Ctrl-C that ended the command: typer turns it into an exit status of 1."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
