"""Wall time of a training step and of an init on a machine, in parts, in seconds."""

from . import activations, flops
from .architecture import Architecture, Linear, lora_parameters
from .hardware import Hardware
from .memory import FLOAT32, weight_bytes
from .workload import Workload

# How often a kept activation, and a logit, goes to or from memory: written, read by what follows, read in the backward
# pass, its gradient written and read; and what lies between two kept ones.
ACTIVATION_TRAFFIC = 6
LOSS_TRAFFIC = 3
ADAM_TRAFFIC = 7  # parameter, gradient and two moments read; parameter and moments written

Parts = dict[str, float]
Targets = list[list[Linear]]


def step_seconds(model: Architecture, targets: Targets, work: Workload, machine: Hardware) -> Parts:
    """A training step on one batch."""
    rank = work.config.rank
    parameters = lora_parameters(targets, rank)
    optimizer = ADAM_TRAFFIC * FLOAT32 * parameters / machine.bandwidth
    if work.precondition:
        optimizer += flops.precondition_flops(targets, rank) / (machine.flops * machine.efficiency)
        optimizer += 6 * FLOAT32 * parameters / machine.bandwidth  # factors and gradients read, new gradients written
    return {
        "forward and backward": _pass(
            model, targets, work, machine, flops.pass_flops(model, targets, work, rank), rank
        ),
        "optimizer": optimizer,
    }


def sketch_seconds(model: Architecture, targets: Targets, work: Workload, machine: Hardware) -> Parts:
    """All passes over all init batches, and the linear algebra between them."""
    count = flops.pass_flops(model, targets, work, work.width, gradients=1)
    once = _pass(model, targets, work, machine, count, work.width)
    return {
        "forward and backward": work.config.passes * work.init_batches * once,
        "QR and SVD": flops.sketch_flops(targets, work) / machine.qr_flops,
    }


def exact_seconds(model: Architecture, targets: Targets, work: Workload, machine: Hardware) -> Parts:
    """One pass over all init batches, and an SVD a layer."""
    count = flops.pass_flops(model, targets, work, rank=0, weights=True)
    gradients = 3 * FLOAT32 * sum(x.weights for block in targets for x in block) / machine.bandwidth
    return {
        "forward and backward": work.init_batches * (_pass(model, targets, work, machine, count, 0) + gradients),
        "QR and SVD": flops.exact_flops(targets) / machine.svd_flops,
    }


def _pass(
    model: Architecture, targets: Targets, work: Workload, machine: Hardware, count: flops.Flops, rank: int
) -> float:
    kept = sum(
        activations.block_bytes(model, block, mine, work, rank)
        for block, mine in zip(model.blocks, targets, strict=True)
    )
    weights = weight_bytes(model, work) * (3 if work.checkpointing else 2)
    traffic = weights + ACTIVATION_TRAFFIC * kept + LOSS_TRAFFIC * activations.loss_bytes(model, work)
    return count.total / (machine.flops * machine.efficiency) + traffic / machine.bandwidth
