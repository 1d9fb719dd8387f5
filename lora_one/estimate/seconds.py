"""Wall time of a training step and of an init on a machine, in parts, in seconds."""

from dataclasses import replace

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
# Calls of the framework in a forward and backward pass, as torch dispatches them: of a block, and more for a LoRA layer
# or for a tap.
BLOCK_CALLS, LORA_CALLS, TAP_CALLS = 190, 27, 16

Parts = dict[str, float]
Targets = list[list[Linear]]


def step_seconds(model: Architecture, targets: Targets, work: Workload, machine: Hardware) -> Parts:
    """A training step on one batch."""
    rank = work.config.rank
    parameters = lora_parameters(targets, rank)
    optimizer = ADAM_TRAFFIC * FLOAT32 * parameters / machine.bandwidth
    if work.precondition:
        optimizer += flops.precondition_flops(targets, rank) / machine.thin_rate(rank)
        optimizer += 6 * FLOAT32 * parameters / machine.bandwidth  # factors and gradients read, new gradients written
    count = flops.pass_flops(model, targets, work, lora=rank)
    kept, loss = activations.block_total(model, targets, work, rank), activations.loss_bytes(model, work)
    return {
        "forward and backward": _pass(model, targets, work, machine, count, rank, kept, loss, LORA_CALLS),
        "optimizer": optimizer,
    }


def sketch_seconds(model: Architecture, targets: Targets, work: Workload, machine: Hardware) -> Parts:
    """All passes over all init batches, and the linear algebra between them."""
    count = flops.pass_flops(model, targets, work, sketch=work.width)
    kept, loss = _kept_by_init(model, targets, work), activations.loss_by_rows_bytes(model, work)
    of_init = replace(machine, flops=machine.init_flops or machine.flops)
    once = _pass(model, targets, work, of_init, count, work.width, kept, loss, TAP_CALLS)
    return {
        "forward and backward": work.config.pass_counts[0] * work.init_batches * once,
        "QR and SVD": _decompositions(flops.sketch_flops(targets, work), work.width, machine),
    }


def exact_seconds(model: Architecture, targets: Targets, work: Workload, machine: Hardware) -> Parts:
    """One pass over all init batches, and the leading triplets of each layer's gradient."""
    count = flops.pass_flops(model, targets, work, exact=True)
    kept, loss = _kept_by_init(model, targets, work), activations.loss_by_rows_bytes(model, work)
    of_init = replace(machine, flops=machine.init_flops or machine.flops)
    once = _pass(model, targets, work, of_init, count, 1, kept, loss, TAP_CALLS)
    gradients = FLOAT32 * sum(x.weights for block in targets for x in block if flops.multiplied_out(x, work))
    once += gradients * (3 / machine.bandwidth + 1 / machine.first_touch)
    width = work.config.rank + flops.EXACT_OVERSAMPLE
    return {
        "forward and backward": work.init_batches * once,
        "QR and SVD": _decompositions(flops.exact_flops(targets, work), width, machine),
    }


def _kept_by_init(model: Architecture, targets: Targets, work: Workload) -> int:
    """Bytes of activations that a pass writes and reads, with a tap's casts."""
    return activations.block_total(model, targets, work, 0) + _casts(targets, work)


def _casts(targets: Targets, work: Workload) -> int:
    """Bytes of the float32 copies that a tap makes of its layer's input and output gradient."""
    if work.item == FLOAT32:
        return 0
    return FLOAT32 * work.tokens * sum(x.rows * (x.in_features + x.out_features) for block in targets for x in block)


def _decompositions(count: flops.Decompositions, width: int, machine: Hardware) -> float:
    work = count.qr / machine.qr_flops + count.svd / machine.svd_flops + count.thin / machine.thin_rate(width)
    work += count.dense_svd / (machine.dense_svd_flops or machine.svd_flops)
    return work + count.calls * machine.call


def _pass(
    model: Architecture,
    targets: Targets,
    work: Workload,
    machine: Hardware,
    count: flops.Flops,
    columns: int,
    kept: int,
    loss: int,
    layer_calls: int,
) -> float:
    kinds = count.kinds
    seconds = kinds.dense / machine.dense_rate + kinds.attention / machine.attention_rate
    seconds += kinds.thin / machine.thin_rate(columns) + kinds.gradients / machine.float32_rate
    calls = BLOCK_CALLS * len(model.blocks) + layer_calls * sum(len(block) for block in targets)
    weights = weight_bytes(model, work) * (3 if work.checkpointing else 2)
    traffic = weights + ACTIVATION_TRAFFIC * kept + LOSS_TRAFFIC * loss
    return seconds + traffic / machine.bandwidth + (kept + loss) / machine.first_touch + calls * machine.call
