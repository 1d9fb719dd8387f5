"""The peak memory of a training step and of an init, in parts, in bytes.

Each job has a few moments that may be its peak. The parts are those of the moment that needs most. They are the bytes
that PyTorch's allocator hands out: the tensors, without what the process itself needs.
"""

from lora_one.core.exact import EXACT_OVERSAMPLE

from . import activations
from .architecture import Architecture, Linear, Targets, lora_parameters
from .flops import exact_products, multiplied_out
from .workload import FLOAT32, Workload

# 4-bit weights have one float32 (bitsandbytes) or two float16 (MLX) per group.
BITS, GROUP, GROUP_BYTES = 4, 64, 4
ADAM_MOMENTS = 2
# Matrices of the gradient's size that its dense SVD holds at once: G, a copy, U, V and LAPACK's workspace.
SVD_COPIES = 5
# Tensors of the directions' size that block Golub-Kahan holds: the directions, their products with G, projections.
BLOCK_COPIES = 6

Parts = dict[str, int]


def weight_bytes(model: Architecture, work: Workload) -> int:
    """Return the bytes of the base model."""
    if not work.quantized:
        return model.parameters * work.item
    packed = sum(linear.weights for block in model.blocks for linear in block.linears)
    return (model.parameters - packed) * work.item + packed * BITS // 8 + packed // GROUP * GROUP_BYTES


def step_memory(model: Architecture, targets: Targets, work: Workload) -> Parts:
    """Return the memory of a LoRA training step with AdamW that frees its gradients.

    A step that accumulates gradients needs theirs in addition.
    """
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
    """Return the memory of the init by sketch.

    Its peak is in one of the last two passes or at the end. From the second batch on, the passes hold the sum of the
    gradients from their beginning.
    """
    loss = activations.loss_by_rows_bytes(model, work)
    passes = work.config.pass_counts[0]
    moments: list[Parts] = []
    for number in (passes - 1, passes):
        columns = work.width if number % 2 else 0  # in odd passes the tap keeps a product instead of the input
        kept = activations.tapped_bytes(model, targets, work, columns)
        backward = activations.backward_bytes(model, targets, work, 0)
        backward += activations.cast_bytes(targets, work, exact=False)
        bases, gradient = _sketches(targets, work, number)
        summed = gradient if work.init_batches > 1 else 0
        moments += [
            {"sketches": bases, "activations": kept, "logits and loss": loss, "sketch gradients": summed},
            {"sketches": bases, "activations": kept + backward, "sketch gradients": summed},
        ]
    factors = FLOAT32 * lora_parameters(targets, work.config.rank)
    moments.append({"sketches": _sketches(targets, work, passes + 1)[0], "singular triplets": factors})
    return _at_peak({"base weights": weight_bytes(model, work), "LoRA factors": factors}, *moments)


def _sketches(targets: Targets, work: Workload, number: int) -> tuple[int, int]:
    """Return the bytes of the bases and coordinates at the given pass, and of the pass's gradients."""
    bases = gradient = 0
    for linear in (linear for block in targets for linear in block):
        k = min(work.width, linear.out_features, linear.in_features)
        size = linear.copies * k * FLOAT32
        probed, product = linear.out_features, linear.in_features
        if number % 2:
            probed, product = product, probed
        coordinates = sum(k * (earlier // 2 + 1) for earlier in range(1, number))
        bases += size * ((number + 1) // 2 * probed + number // 2 * product + coordinates)
        gradient += size * product
    return bases, gradient


def exact_memory(model: Architecture, targets: Targets, work: Workload) -> Parts:
    """Return the memory of the init by exact gradients.

    From a single batch it holds one gradient at a time, from several batches all of them.
    """
    total = FLOAT32 * sum(linear.weights for block in targets for linear in block)
    kept = activations.tapped_bytes(model, targets, work, 0)
    recomputed = activations.recomputed_bytes(model, targets, work, 0)
    backward = activations.backward_bytes(model, targets, work, 0) + activations.cast_bytes(targets, work, exact=True)
    always = {
        "base weights": weight_bytes(model, work),
        "LoRA factors": FLOAT32 * lora_parameters(targets, work.config.rank),
        "full gradients": total if work.init_batches > 1 else 0,
    }
    largest = max(_decomposition(linear, work) for block in targets for linear in block)
    return _at_peak(
        always,
        {"activations": kept, "logits and loss": activations.loss_by_rows_bytes(model, work)},
        {"activations": kept + backward},
        # The first gradient comes after the loss's tensors are freed, while nearly all activations still exist.
        {"activations": kept + recomputed, "one gradient's SVD": largest},
    )


def _decomposition(linear: Linear, work: Workload) -> int:
    """Return the bytes to find one gradient's leading triplets."""
    products, dense = exact_products(linear, work.config.rank)
    matrix = FLOAT32 * linear.out_features * linear.in_features
    if dense:
        return SVD_COPIES * matrix
    directions = (work.config.rank + EXACT_OVERSAMPLE) * (products + 1) // 2
    blocks = FLOAT32 * directions * (linear.out_features + linear.in_features)
    copies = 1 if work.init_batches == 1 else 2  # the sum over the batches, and the mean
    return copies * matrix * multiplied_out(linear, work) + BLOCK_COPIES * blocks


def _at_peak(always: Parts, *moments: Parts) -> Parts:
    """Return the parts that always exist and those of the largest moment; parts of the other moments are 0."""
    names = dict.fromkeys(name for moment in moments for name in moment)
    largest = max(moments, key=lambda moment: sum(moment.values()))
    return {**always, **{name: largest.get(name, 0) for name in names}}
