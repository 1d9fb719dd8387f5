"""Memory of a training step and of an init at its peak, in parts, in bytes, without what the process itself takes."""

from . import activations
from .architecture import Architecture, Linear, lora_parameters
from .workload import Workload

FLOAT32 = 4
BITS, GROUP, GROUP_BYTES = 4, 64, 4  # 4-bit weights: a float32 (bitsandbytes), or two float16 (MLX), a group
ADAM_MOMENTS = 2
# Matrices of the gradient's size that its dense SVD holds at once: G, a copy, U, V and LAPACK's workspace.
SVD_COPIES = 8

Parts = dict[str, int]
Targets = list[list[Linear]]


def weight_bytes(model: Architecture, work: Workload) -> int:
    """The base model."""
    if not work.quantized:
        return model.parameters * work.item
    packed = sum(linear.weights for block in model.blocks for linear in block.linears)
    rest = model.parameters - packed
    return rest * work.item + packed * BITS // 8 + packed // GROUP * GROUP_BYTES


def step_memory(model: Architecture, targets: Targets, work: Workload) -> Parts:
    """A LoRA training step with AdamW."""
    factors = FLOAT32 * lora_parameters(targets, work.config.rank)
    return {
        "base weights": weight_bytes(model, work),
        "LoRA factors": factors,
        "LoRA gradients": factors * (2 if work.precondition else 1),
        "Adam moments": ADAM_MOMENTS * factors,
        "activations": activations.kept_bytes(model, targets, work, work.config.rank),
        "logits and loss": activations.loss_bytes(model, work),
    }


def sketch_memory(model: Architecture, targets: Targets, work: Workload) -> Parts:
    """The init by sketch, in its last pass; from the second batch on the gradients are there in the forward pass."""
    kept = activations.kept_bytes(model, targets, work, work.width)
    loss = activations.loss_bytes(model, work)
    known, gradient = 0, 0
    for x in (x for block in targets for x in block):
        size = x.copies * min(work.width, x.out_features, x.in_features) * FLOAT32
        for number in range(1, work.config.passes + 1):
            probed, product = (x.in_features, x.out_features) if number % 2 else (x.out_features, x.in_features)
            known += size * (probed + (product if number < work.config.passes else 0))
        gradient += size * product
    parts = {
        "base weights": weight_bytes(model, work),
        "LoRA factors": FLOAT32 * lora_parameters(targets, work.config.rank),
        "sketches": known + gradient,  # what earlier passes found, and the zero factor that is probed for
        "sketch gradients": gradient,
        "activations": kept,
        "logits and loss": loss,
    }
    if work.init_batches == 1:  # they only come while activations go
        parts["sketch gradients"] = max(0, gradient - kept - loss)
    return parts


def exact_memory(model: Architecture, targets: Targets, work: Workload) -> Parts:
    """The init by exact gradients: one at a time from a single batch, all of them from several."""
    sizes = [FLOAT32 * x.out_features * x.in_features for block in targets for x in block]
    total = FLOAT32 * sum(x.weights for block in targets for x in block)
    loss = activations.loss_bytes(model, work)
    # The first SVD comes when the loss is done with, and nearly all activations are still there.
    largest = SVD_COPIES * max(sizes)
    return {
        "base weights": weight_bytes(model, work),
        "LoRA factors": FLOAT32 * lora_parameters(targets, work.config.rank),
        "full gradients": total if work.init_batches > 1 else 0,
        "one gradient's SVD": max(0, largest - loss),
        "activations": activations.kept_bytes(model, targets, work, 0),
        "logits and loss": loss,
    }


def loraga_memory(model: Architecture, targets: Targets, work: Workload) -> Parts | None:
    """PEFT's LoRA-GA for comparison: a gradient of every target weight in its own dtype. None: it refuses 4 bits."""
    if work.quantized:
        return None
    return {
        "base weights": weight_bytes(model, work),
        "full gradients": work.item * sum(x.weights for block in targets for x in block),
        "activations": activations.kept_bytes(model, targets, work, 0),
        "logits and loss": activations.loss_bytes(model, work),
    }
