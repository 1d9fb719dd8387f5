"""An estimate as text."""

from collections.abc import Mapping

from .jobs import Estimate

GIB = 2**30
WIDTH = 67  # columns of a table of three jobs


def as_text(estimate: Estimate, narrow: bool = False) -> str:
    """Return the estimate as lines of text: the job and the machine, then the memory and the time of each part.

    Args:
        narrow: give each job a table of its own, of 37 columns, instead of a column in one of `WIDTH` columns.
    """
    work, machine = estimate.workload, estimate.hardware
    bits = ", 4-bit" if work.quantized else ""
    lines = [
        f"{estimate.model.name} ({estimate.model.model_type}): {_count(estimate.parameters)} parameters; LoRA of rank "
        f"{work.config.rank} on {estimate.layers} layers: {_count(estimate.trainable)}",
        f"batches of {work.batch_size} x {work.seq_len} tokens, {work.init_batches} for the init; {work.dtype}{bits}, "
        f"{work.attention} attention, {'with' if work.checkpointing else 'without'} checkpointing",
        f"{machine.name}: {machine.flops / 1e12:.3g} TFLOP/s x {machine.efficiency:g}, "
        f"{machine.bandwidth / 1e9:.4g} GB/s",
        "",
        *_sections("memory, GiB", {job: column.memory for job, column in estimate.columns.items()}, GIB, narrow),
        *_sections("time, s", {job: column.seconds for job, column in estimate.columns.items()}, 1.0, narrow),
        *(f"note: {note}" for note in estimate.notes),
        "memory is that of tensors; a CUDA context, or the framework on a CPU, comes on top",
    ]
    return "\n".join(lines)


def _sections(title: str, jobs: Mapping[str, Mapping[str, float]], unit: float, narrow: bool) -> list[str]:
    groups = [{job: values} for job, values in jobs.items()] if narrow else [jobs]
    return [line for group in groups for line in [*_section(title, group, unit), ""]]


def _section(title: str, jobs: Mapping[str, Mapping[str, float]], unit: float) -> list[str]:
    """Return a row per part that any job has, and the totals."""
    parts = list(dict.fromkeys(part for values in jobs.values() for part in values))
    lines = [f"{title:<22}" + "".join(f"{job:>15}" for job in jobs)]
    for part in parts:
        cells = "".join(f"{_cell(values[part] / unit) if part in values else '':>15}" for values in jobs.values())
        lines.append(f"{part:<22}{cells}")
    lines.append(f"{'total':<22}" + "".join(f"{_cell(sum(values.values()) / unit):>15}" for values in jobs.values()))
    return lines


def _cell(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
