"""`lora-one conformance`, `estimate` and `doctor`: the commands about a machine."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .bars import bar
from .output import AsJson, output
from .quiet import quiet
from .values import one_of

BACKENDS = ("numpy", "torch", "jax", "mlx")
DTYPES = ("float32", "float64", "bfloat16")  # of the suite
STORED = ("float32", "bfloat16", "float16")  # of base weights
HARDWARE = ("A100", "H100", "H200", "L4", "RTX4090")


def conformance(
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="numpy, torch, jax or mlx; default: all.", autocompletion=one_of(BACKENDS)),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, gpu, ...")] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float64 or bfloat16; default: all.", autocompletion=one_of(DTYPES)),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that the frameworks here compute the right numbers.

    The exit status is 1 where one of them is off.
    """
    from lora_one.conformance import check_installed

    from .tables import conformance_tables

    with output(as_json) as out:
        with bar(out.console, "Checking") as advance, quiet(out.console):
            result = check_installed(backend, device, dtype, advance)
        for table in conformance_tables(result):
            out.show(table)
        for line in [*result.explain_failures().splitlines(), *result.notes]:
            out.say(escape(line))
        out.say(f"[bold {'green' if result.passed else 'red'}]{escape(result.verdict)}[/]")
        out.values = result.to_dict()
    if not result.passed:
        raise typer.Exit(1)


def estimate(
    model: Annotated[Path, typer.Option("--model", help="Folder with a config.json; no weights are needed.")],
    rank: Annotated[int, typer.Option("--rank", "-r")] = 8,
    rank_max: Annotated[int | None, typer.Option("--rank-max", help="Of a layer, where ranks differ.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a sequence.")] = 2048,
    init_batches: Annotated[int, typer.Option("--init-batches")] = 8,
    dtype: Annotated[str, typer.Option("--dtype", autocompletion=one_of(STORED))] = "bfloat16",
    quantized: Annotated[bool, typer.Option("--quantized", help="4-bit base weights.")] = False,
    attention: Annotated[
        str, typer.Option("--attention", help="sdpa or eager.", autocompletion=one_of(("sdpa", "eager")))
    ] = "sdpa",
    checkpointing: Annotated[bool, typer.Option("--checkpointing")] = False,
    precondition: Annotated[bool, typer.Option("--precondition")] = False,
    targets: Annotated[str, typer.Option("--targets", help='"all-linear", or names with commas.')] = "all-linear",
    passes: Annotated[int, typer.Option("--passes", help="Over the batches of init.")] = 1,
    oversample: Annotated[int, typer.Option("--oversample")] = 16,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", help="H100, ...; default: this CPU, measured.", autocompletion=one_of(HARDWARE)),
    ] = None,
    tflops: Annotated[float | None, typer.Option("--tflops", help="Peak in the dtype.")] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", help="GB/s.")] = None,
    efficiency: Annotated[float | None, typer.Option("--efficiency", help="Share of the peak, 0 to 1.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory and time of starts and training steps.

    Only config.json is read.
    """
    from lora_one.config import Config
    from lora_one.estimate import Workload, read_architecture
    from lora_one.estimate import estimate as run
    from lora_one.estimate.rates.choice import choose
    from lora_one.estimate.table import WIDTH, as_text

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
    with output(as_json) as out:
        with bar(out.console, "Estimating"), quiet(out.console):
            result = run(read_architecture(model), work, choose(hardware, tflops, bandwidth, efficiency, dtype))
        is_narrow = out.console.is_terminal and out.console.width < WIDTH
        out.say(escape(as_text(result, is_narrow)))
        out.values = result.to_dict()


def doctor(as_json: AsJson = False) -> None:
    """Show which frameworks and devices work here.

    Says what each missing one is for. The exit status is 1 if an installed one is broken.
    """
    from lora_one.doctor.examination import describe, examine

    with output(as_json) as out:
        with bar(out.console, "Importing the frameworks") as advance, quiet(out.console):
            examination = examine(advance)
        out.say(escape(describe(examination)))
        out.values = examination.to_dict()
    if any(part.state == "broken" for part in examination.parts):
        raise typer.Exit(1)
