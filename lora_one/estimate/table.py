"""An estimate as text."""

from collections.abc import Mapping

from . import Estimate, measured_error

GIB = 2**30


def as_text(found: Estimate) -> str:
    """Two lines on what is estimated, the parts of each job, and how far such estimates were off."""
    work, machine = found.workload, found.hardware
    bits = ", 4-bit" if work.quantized else ""
    lines = [
        f"{found.model.name} ({found.model.model_type}): {_count(found.parameters)} parameters; LoRA of rank "
        f"{work.config.rank} on {found.layers} layers: {_count(found.trainable)}",
        f"batches of {work.batch_size} x {work.seq_len} tokens, {work.init_batches} for the init; {work.dtype}{bits}, "
        f"{work.attention} attention, {'with' if work.checkpointing else 'without'} checkpointing",
        f"{machine.name}: {machine.flops / 1e12:.3g} TFLOP/s x {machine.efficiency:g}, "
        f"{machine.bandwidth / 1e9:.4g} GB/s",
        "",
        *_section("memory, GiB", {job: column.memory for job, column in found.columns.items()}, GIB),
        *_resident(found),
        "",
        *_section("time, s", {j: c.seconds for j, c in found.columns.items() if c.seconds is not None}, 1.0),
        "",
        *(f"note: {note}" for note in found.notes),
        *_error_lines(),
    ]
    return "\n".join(lines)


def _section(title: str, jobs: Mapping[str, Mapping[str, float]], unit: float) -> list[str]:
    """A row for every part that any job has, and the totals."""
    parts = list(dict.fromkeys(part for parts in jobs.values() for part in parts))
    lines = [f"{title:<22}" + "".join(f"{job:>15}" for job in jobs)]
    for part in parts:
        cells = "".join(f"{_cell(values[part] / unit) if part in values else '':>15}" for values in jobs.values())
        lines.append(f"{part:<22}{cells}")
    lines.append(f"{'total':<22}" + "".join(f"{_cell(sum(values.values()) / unit):>15}" for values in jobs.values()))
    return lines


def _resident(found: Estimate) -> list[str]:
    cells = ["" if c.resident is None else _cell(c.resident / GIB) for c in found.columns.values()]
    return [f"{'resident, the process':<22}" + "".join(f"{cell:>15}" for cell in cells)] if any(cells) else []


def _cell(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _error_lines() -> list[str]:
    error = measured_error()
    if error is None:
        return ["how far off such estimates are has not been measured: python -m benchmarks.cost does it"]
    text = [f"measured over estimated, {error['runs']} runs on {error['device']}:"]
    for what, meaning in (("live", "memory of tensors"), ("resident", "resident memory"), ("time", "time")):
        spread = error[what]
        text.append(f"  {meaning} {spread['least']:.2f} to {spread['most']:.2f}, median {spread['median']:.2f}")
    text.append("  (memory above the loaded model; a CUDA context, or the framework on a CPU, comes on top of tensors)")
    return text
