"""The wall time of a training step and of an init on a machine, in parts, in seconds."""

from dataclasses import replace

from lora_one.core.exact import EXACT_OVERSAMPLE

from . import activations, flops
from .architecture import Architecture, Targets, lora_parameters
from .hardware import Hardware
from .memory import weight_bytes
from .workload import FLOAT32, Workload

# How often a kept activation is moved between memory and processor: written, read by the next operation, read in the
# backward pass, its gradient written and read; one more for the tensors between two kept ones. For logits it is less.
ACTIVATION_TRAFFIC = 6
LOSS_TRAFFIC = 3
ADAM_TRAFFIC = 7  # parameter, gradient and two moments read; parameter and moments written
PRECONDITION_TRAFFIC = 6  # factors and gradients read, new gradients written
# Calls of the framework in a forward and backward pass, as torch dispatches them: per block, and in addition per LoRA
# layer or per tap.
BLOCK_CALLS, LORA_CALLS, TAP_CALLS = 190, 27, 16

Parts = dict[str, float]


def step_seconds(model: Architecture, targets: Targets, work: Workload, machine: Hardware) -> Parts:
    """Return the time of a training step on one batch."""
    rank = work.config.rank
    parameters = lora_parameters(targets, rank)
    optimizer = ADAM_TRAFFIC * FLOAT32 * parameters / machine.bandwidth
    if work.precondition:
        optimizer += flops.precondition_flops(targets, rank) / machine.thin_rate(rank)
        optimizer += PRECONDITION_TRAFFIC * FLOAT32 * parameters / machine.bandwidth
    count = flops.pass_flops(model, targets, work, lora=rank)
    kept, loss = activations.block_total(model, targets, work, rank), activations.loss_bytes(model, work)
    calls = _calls(model, targets, LORA_CALLS)
    return {
        "forward and backward": _pass(count, rank, _traffic(model, work, kept, loss), kept + loss, calls, machine),
        "optimizer": optimizer,
    }


def sketch_seconds(model: Architecture, targets: Targets, work: Workload, machine: Hardware) -> Parts:
    """Return the time of all passes over all init batches, and of renewing the running SVDs."""
    first = flops.pass_flops(model, targets, work)
    further = flops.pass_flops(model, targets, work, sketch=2 * work.width)
    per_batch = _init_pass(model, targets, work, machine, first, work.width)
    per_batch += (work.config.pass_counts[0] - 1) * _init_pass(model, targets, work, machine, further, work.width)
    return {
        "forward and backward": work.init_batches * per_batch,
        "running SVDs": _decompositions(flops.sketch_flops(targets, work), work.width, machine),
    }


def exact_seconds(model: Architecture, targets: Targets, work: Workload, machine: Hardware) -> Parts:
    """Return the time of one pass over all init batches and of finding each gradient's leading triplets."""
    count = flops.pass_flops(model, targets, work, exact=True)
    per_batch = _init_pass(model, targets, work, machine, count, 1)
    formed = (linear for block in targets for linear in block if flops.multiplied_out(linear, work))
    gradients = FLOAT32 * sum(linear.weights for linear in formed)
    per_batch += gradients * (3 / machine.bandwidth + 1 / machine.first_touch)
    width = work.directions + EXACT_OVERSAMPLE
    return {
        "forward and backward": work.init_batches * per_batch,
        "QR and SVD": _decompositions(flops.exact_flops(targets, work), width, machine),
    }


def _init_pass(
    model: Architecture,
    targets: Targets,
    work: Workload,
    machine: Hardware,
    count: flops.Flops,
    columns: int,
) -> float:
    """Return the time of an init's forward and backward pass over one batch.

    Args:
        columns: of the taps' thin products.
    """
    kept = activations.block_total(model, targets, work, 0) + _casts(targets, work)
    loss = activations.loss_by_rows_bytes(model, work)
    calls = _calls(model, targets, TAP_CALLS)
    of_init = replace(machine, flops=machine.init_flops or machine.flops)
    return _pass(count, columns, _traffic(model, work, kept, loss), kept + loss, calls, of_init)


def _casts(targets: Targets, work: Workload) -> int:
    """Return the bytes of all float32 casts of the taps' inputs and output gradients."""
    if work.item == FLOAT32:
        return 0
    return (
        FLOAT32
        * work.tokens
        * sum(linear.rows * (linear.in_features + linear.out_features) for block in targets for linear in block)
    )


def _traffic(model: Architecture, work: Workload, kept: int, loss: int) -> int:
    """Return the bytes that a pass moves between memory and processor.

    Args:
        kept: bytes of activations.
        loss: bytes of logits and loss.
    """
    weights = weight_bytes(model, work) * (3 if work.checkpointing else 2)
    return weights + ACTIVATION_TRAFFIC * kept + LOSS_TRAFFIC * loss


def _calls(model: Architecture, targets: Targets, per_target: int) -> int:
    """Return the number of the framework's calls in a pass."""
    return BLOCK_CALLS * len(model.blocks) + per_target * sum(len(block) for block in targets)


def _pass(count: flops.Flops, columns: int, traffic: int, written: int, calls: int, machine: Hardware) -> float:
    """Return the time of a forward and backward pass.

    Args:
        columns: of the thin products.
        traffic: bytes moved between memory and processor.
        written: bytes of memory written for the first time.
        calls: number of the framework's calls.
    """
    by_rate = count.by_rate
    seconds = by_rate.dense / machine.dense_rate + by_rate.attention / machine.attention_rate
    seconds += by_rate.thin / machine.thin_rate(columns) + by_rate.gradients / machine.float32_rate
    return seconds + traffic / machine.bandwidth + written / machine.first_touch + calls * machine.call


def _decompositions(count: flops.Decompositions, width: int, machine: Hardware) -> float:
    """Return the time of the linear algebra between passes.

    Args:
        width: columns of the thin products.
    """
    seconds = count.qr / machine.qr_flops + count.svd / machine.svd_flops + count.thin / machine.thin_rate(width)
    seconds += count.dense_svd / (machine.dense_svd_flops or machine.svd_flops)
    return seconds + count.calls * machine.call
