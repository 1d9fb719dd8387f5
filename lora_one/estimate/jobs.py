"""The jobs whose memory and time are estimated: a training step and both kinds of init."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture, Targets, lora_parameters, target_linears
from .hardware import Hardware
from .memory import exact_memory, sketch_memory, step_memory
from .seconds import exact_seconds, sketch_seconds, step_seconds
from .workload import Workload


@dataclass(frozen=True)
class Column:
    """The costs of one job, by part.

    Attributes:
        memory: bytes of tensors at the peak.
        seconds: wall time.
    """

    memory: dict[str, int]
    seconds: dict[str, float]

    @property
    def total_memory(self) -> int:
        """Bytes of all tensors at the peak."""
        return sum(self.memory.values())

    @property
    def total_seconds(self) -> float:
        """Wall time of the whole job."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Estimate:
    """The content of `lora-one estimate`.

    Attributes:
        parameters: number of parameters of the base model.
        layers: number of pairs of LoRA factors; each expert has its own.
        trainable: number of entries of these pairs.
        columns: job -> its costs: "training step", "init, sketch", "init, exact".
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
        """Return the estimate as plain data, in bytes and seconds."""
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
                    "seconds": {**column.seconds, "total": column.total_seconds},
                }
                for job, column in self.columns.items()
            },
            "notes": self.notes,
        }


def estimate(model: Architecture, work: Workload, machine: Hardware) -> Estimate:
    """Estimate the memory and time of a training step and of both kinds of init.

    Raises:
        ConfigError: the model does not have one of the targets.
    """
    names = work.config.targets
    targets = target_linears(model, names if isinstance(names, str) else tuple(names))
    columns = {
        "training step": Column(step_memory(model, targets, work), step_seconds(model, targets, work, machine)),
        "init, sketch": Column(sketch_memory(model, targets, work), sketch_seconds(model, targets, work, machine)),
        "init, exact": Column(exact_memory(model, targets, work), exact_seconds(model, targets, work, machine)),
    }
    return Estimate(
        model=model,
        workload=work,
        hardware=machine,
        parameters=model.parameters,
        layers=sum(linear.copies for block in targets for linear in block),
        trainable=lora_parameters(targets, work.config.rank),
        columns=columns,
        notes=[*_notes_on_targets(model, targets, work), *_notes_on_machine(work, columns, machine)],
    )


def _notes_on_targets(model: Architecture, targets: Targets, work: Workload) -> list[str]:
    notes = []
    rank = work.config.rank
    small = {
        linear.name for block in targets for linear in block if min(linear.out_features, linear.in_features) < rank
    }
    if small:
        notes.append(f"rank {rank} is above the size of {', '.join(sorted(small))}: `init` asks to leave it out")
    routed = [linear for block in model.blocks for linear in block.linears if not linear.module]
    if routed and work.config.targets == "all-linear":
        notes.append(
            f"router and {max(linear.copies for linear in routed)} stacked experts a block are not counted as targets: "
            "`init` on PyTorch leaves them as they are, and says so. On MLX experts may be targets "
            "(q_proj,...,experts)"
        )
    return notes


def _notes_on_machine(work: Workload, columns: dict[str, Column], machine: Hardware) -> list[str]:
    notes = []
    if machine.memory is not None:
        for job, column in columns.items():
            if column.total_memory > machine.memory:
                notes.append(f"{job}: more than the {machine.memory / 1e9:.0f} GB of one {machine.name}")
    if work.dtype != "float32" and "NumPy" in machine.name:
        notes.append(
            f"PyTorch is not installed: the rates are NumPy's in float32, those in {work.dtype} may differ much"
        )
    return notes
