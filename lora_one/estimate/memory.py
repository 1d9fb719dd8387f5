"""Memory of a training step and of an init at its peak, in parts, in bytes, without what the process itself takes.

Each job is a few moments that may be its peak; the parts are those of the moment that holds most. They are what
PyTorch's allocator has handed out. What a process on a CPU holds on to is more: `resident_bytes`.
"""

from . import activations
from .architecture import Architecture, Linear, lora_parameters
from .flops import EXACT_OVERSAMPLE, exact_products, multiplied_out
from .workload import Workload

FLOAT32 = 4
BITS, GROUP, GROUP_BYTES = 4, 64, 4  # 4-bit weights: a float32 (bitsandbytes), or two float16 (MLX), a group
ADAM_MOMENTS = 2
# Matrices of the gradient's size that its dense SVD holds at once: G, a copy, U, V and LAPACK's workspace.
SVD_COPIES = 5
BLOCK_COPIES = 6  # of the directions: known ones, their products with G, and what is being projected
# glibc's malloc takes tensors up to this size from a heap, which keeps the holes between long-lived ones. Measured
# (docs/estimate.md): activations and loss, which come and go, take this many times their bytes there.
HEAP_LIMIT = 32 * 2**20
HEAP_SLACK = 1.8
PROCESS = 0.45 * 2**30  # Python, torch, transformers and PEFT, imported and used once

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
    """A LoRA training step with AdamW, which drops its gradients; adding them up over steps takes theirs on top."""
    rank = work.config.rank
    factors = FLOAT32 * lora_parameters(targets, rank)
    kept = activations.kept_bytes(model, targets, work, rank)
    always = {
        "base weights": weight_bytes(model, work),
        "LoRA factors": factors,
        "Adam moments": ADAM_MOMENTS * factors,
    }
    return _at_peak(
        always,
        {"activations": kept, "logits and loss": activations.loss_bytes(model, work)},
        {"activations": kept + activations.backward_bytes(model, targets, work, rank)},
        {"LoRA gradients": factors * (2 if work.precondition else 1)},
    )


def sketch_memory(model: Architecture, targets: Targets, work: Workload) -> Parts:
    """The init by sketch, in one of its last two passes, where from the second batch on the gradients are there early,
    or at its end.
    """
    loss = activations.loss_by_rows_bytes(model, work)
    passes = work.config.pass_counts[0]
    moments: list[Parts] = []
    for number in (passes - 1, passes):
        columns = work.width if number % 2 else 0  # what the tap keeps of each input in place of the input itself
        kept = activations.tapped_bytes(model, targets, work, columns)
        again = activations.backward_bytes(model, targets, work, 0) + activations.cast_bytes(targets, work, exact=False)
        known, gradient = _sketches(targets, work, number)
        early = gradient if work.init_batches > 1 else 0
        for moment in (
            {"activations": kept, "logits and loss": loss, "sketch gradients": early},
            {"activations": kept + again, "sketch gradients": early},
        ):
            moments.append({"sketches": known, **moment})
    factors = FLOAT32 * lora_parameters(targets, work.config.rank)
    moments.append({"sketches": _sketches(targets, work, passes + 1)[0], "singular triplets": factors})
    return _at_peak({"base weights": weight_bytes(model, work), "LoRA factors": factors}, *moments)


def _sketches(targets: Targets, work: Workload, number: int) -> tuple[int, int]:
    """What a pass finds, with the basis that it probes, and what it yields."""
    known = gradient = 0
    for x in (x for block in targets for x in block):
        k = min(work.width, x.out_features, x.in_features)
        size = x.copies * k * FLOAT32
        probed, product = (x.in_features, x.out_features) if number % 2 else (x.out_features, x.in_features)
        coordinates = sum(k * (earlier // 2 + 1) for earlier in range(1, number))
        known += size * ((number + 1) // 2 * probed + number // 2 * product + coordinates)
        gradient += size * product
    return known, gradient


def exact_memory(model: Architecture, targets: Targets, work: Workload) -> Parts:
    """The init by exact gradients: one at a time from a single batch, all of them from several."""
    total = FLOAT32 * sum(x.weights for block in targets for x in block)
    kept = activations.tapped_bytes(model, targets, work, 0)
    again = activations.recomputed_bytes(model, targets, work, 0)
    backward = activations.backward_bytes(model, targets, work, 0) + activations.cast_bytes(targets, work, exact=True)
    always = {
        "base weights": weight_bytes(model, work),
        "LoRA factors": FLOAT32 * lora_parameters(targets, work.config.rank),
        "full gradients": total if work.init_batches > 1 else 0,
    }
    largest = max(_decomposition(x, work) for block in targets for x in block)
    return _at_peak(
        always,
        {"activations": kept, "logits and loss": activations.loss_by_rows_bytes(model, work)},
        {"activations": kept + backward},
        # The first one comes when the loss is done with, and nearly all activations are still there.
        {"activations": kept + again, "one gradient's SVD": largest},
    )


def _decomposition(linear: Linear, work: Workload) -> int:
    """While a gradient becomes its leading triplets."""
    products, dense = exact_products(linear, work.config.rank)
    matrix = FLOAT32 * linear.out_features * linear.in_features
    directions = (work.config.rank + EXACT_OVERSAMPLE) * (products + 1) // 2
    blocks = FLOAT32 * directions * (linear.out_features + linear.in_features)
    if dense:
        return SVD_COPIES * matrix
    copies = 1 if work.init_batches == 1 else 2  # the sum over the batches, and the mean
    return copies * matrix * multiplied_out(linear, work) + BLOCK_COPIES * blocks


def loraga_memory(model: Architecture, targets: Targets, work: Workload) -> Parts | None:
    """PEFT's LoRA-GA for comparison: a gradient of every target weight in its own dtype. None: it refuses 4 bits.

    In the first batch gradients come as activations go, so that they add up in none of its moments.
    """
    if work.quantized:
        return None
    kept = activations.kept_bytes(model, targets, work, 0)
    total = work.item * sum(x.weights for block in targets for x in block)
    earlier = total if work.init_batches > 1 else 0
    return _at_peak(
        {"base weights": weight_bytes(model, work)},
        {"full gradients": earlier, "activations": kept, "logits and loss": activations.loss_bytes(model, work)},
        {"full gradients": earlier, "activations": kept + activations.backward_bytes(model, targets, work, 0)},
        {"full gradients": total},
    )


def resident_bytes(parts: Parts, model: Architecture, work: Workload) -> int:
    """What a process on a CPU under glibc holds at the peak: itself, and the parts with the holes between them."""
    tensors = {
        "activations": work.tokens * model.hidden * work.item,
        "logits and loss": work.tokens * model.vocabulary * FLOAT32,
    }
    in_heap = sum(parts.get(part, 0) for part, size in tensors.items() if size < HEAP_LIMIT)
    return round(PROCESS + sum(parts.values()) + (HEAP_SLACK - 1) * in_heap)


def _at_peak(always: Parts, *moments: Parts) -> Parts:
    """What is there always, and the parts of the moment that holds most; 0 for those of other moments."""
    names = dict.fromkeys(name for moment in moments for name in moment)
    most = max(moments, key=lambda moment: sum(moment.values()))
    return {**always, **{name: most.get(name, 0) for name in names}}
