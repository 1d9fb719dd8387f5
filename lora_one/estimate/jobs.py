"""The jobs whose memory and time are estimated: a training step and the kinds of init."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architecture import Architecture, lora_parameters, target_linears
from .hardware import Hardware
from .memory import exact_memory, loraga_memory, resident_bytes, sketch_memory, step_memory
from .seconds import exact_seconds, sketch_seconds, step_seconds
from .workload import Workload

MEASURED = Path(__file__).parent / "measured.json"  # written by benchmarks/cost.py


@dataclass(frozen=True)
class Column:
    """One job's parts, in bytes and seconds.

    Attributes:
        memory: of tensors, at the peak.
        resident: bytes of the whole process at the peak; None where tensors are not in the process's heap.
        seconds: None for what this library does not run.
    """

    memory: dict[str, int]
    resident: int | None
    seconds: dict[str, float] | None

    @property
    def total_memory(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    @property
    def total_seconds(self) -> float | None:
        """Wall time."""
        return None if self.seconds is None else sum(self.seconds.values())


@dataclass(frozen=True)
class Estimate:
    """All that `lora-one estimate` prints.

    Attributes:
        parameters: of the base model.
        layers: pairs of LoRA factors; an expert counts as one.
        trainable: entries of these pairs.
        columns: by job: "training step", "init, sketch", "init, exact", "PEFT LoRA-GA".
        notes: what the reader should know about these targets.
    """

    model: Architecture
    workload: Workload
    hardware: Hardware
    parameters: int
    layers: int
    trainable: int
    columns: dict[str, Column]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: bytes and seconds."""
        return {
            "model": self.model.name,
            "model_type": self.model.model_type,
            "parameters": self.parameters,
            "lora_layers": self.layers,
            "lora_parameters": self.trainable,
            "workload": dataclasses.asdict(self.workload),
            "hardware": dataclasses.asdict(self.hardware),
            "jobs": {
                job: {
                    "memory": {**column.memory, "total": column.total_memory},
                    "resident": column.resident,
                    "seconds": None if column.seconds is None else {**column.seconds, "total": column.total_seconds},
                }
                for job, column in self.columns.items()
            },
            "notes": self.notes,
            "measured_over_estimated": measured_error(),
        }


def estimate(model: Architecture, work: Workload, machine: Hardware) -> Estimate:
    """The memory and time of a training step and of an init.

    Raises:
        ConfigError: targets that the model does not have.
    """
    wanted = work.config.targets
    targets = target_linears(model, wanted if isinstance(wanted, str) else tuple(wanted))
    memory = {
        "training step": step_memory(model, targets, work),
        "init, sketch": sketch_memory(model, targets, work),
        "init, exact": exact_memory(model, targets, work),
    }
    loraga = loraga_memory(model, targets, work)
    if loraga is not None:
        memory["PEFT LoRA-GA"] = loraga
    seconds = {
        "training step": step_seconds(model, targets, work, machine),
        "init, sketch": sketch_seconds(model, targets, work, machine),
        "init, exact": exact_seconds(model, targets, work, machine),
    }
    columns = {
        job: Column(parts, resident_bytes(parts, model, work) if machine.heap else None, seconds.get(job))
        for job, parts in memory.items()
    }
    rank = work.config.rank
    return Estimate(
        model=model,
        workload=work,
        hardware=machine,
        parameters=model.parameters,
        layers=sum(linear.copies for block in targets for linear in block),
        trainable=lora_parameters(targets, rank),
        columns=columns,
        notes=_notes(model, targets, work, columns, machine),
    )


def _notes(
    model: Architecture, targets: list[list[Any]], work: Workload, columns: dict[str, Column], machine: Hardware
) -> list[str]:
    notes = []
    rank = work.config.rank
    small = {x.name for block in targets for x in block if min(x.out_features, x.in_features) < rank}
    if small:
        notes.append(f"rank {rank} is above the size of {', '.join(sorted(small))}: `init` asks to leave it out")
    routed = [x for block in model.blocks for x in block.linears if not x.module]
    if routed and work.config.targets == "all-linear":
        notes.append(
            f"router and {max(x.copies for x in routed)} stacked experts a block are not counted as targets: `init` "
            "on PyTorch leaves them as they are, and says so. On MLX experts may be targets (q_proj,...,experts)"
        )
    if machine.memory is not None:
        for job, column in columns.items():
            if column.total_memory > machine.memory:
                notes.append(f"{job}: more than the {machine.memory / 1e9:.0f} GB of one {machine.name}")
    if work.dtype != "float32" and "NumPy" in machine.name:
        notes.append(
            f"PyTorch is not installed: the rates are NumPy's in float32, those in {work.dtype} may differ much"
        )
    return notes


def measured_error() -> dict[str, Any] | None:
    """Measured over estimated, as `python -m benchmarks.cost` found it: least, median and most, and where.

    None where it has not been measured.
    """
    if not MEASURED.is_file():
        return None
    return json.loads(MEASURED.read_text(encoding="utf-8"))
