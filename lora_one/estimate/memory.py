"""The peak memory of a training step and of an init, in parts, in bytes.

Each job has a few moments that may be its peak. The parts are those of the moment that needs most. They are the bytes
that PyTorch's allocator hands out: the tensors, without what the process itself needs.
"""

from lora_one.core.exact import EXACT_OVERSAMPLE
from lora_one.core.fold import TEST_COLUMNS

from . import activations
from .architecture import Architecture, Linear, Targets, lora_parameters
from .flops import exact_products, multiplied_out, waiting_tokens
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
    """Return the memory of the init by running SVDs.

    The first pass renews them layer by layer, and rows may wait for those of later batches. A further pass holds the
    products with both sides of all layers.
    """
    layers = [linear for block in targets for linear in block]
    loss, kept = activations.loss_by_rows_bytes(model, work), activations.kept_bytes(model, targets, work, 0)
    backward = activations.backward_bytes(model, targets, work, 0)
    sides = FLOAT32 * sum(_columns(linear, work) * _length(linear) for linear in layers)
    states = sides + FLOAT32 * TEST_COLUMNS * sum(map(_length, layers))
    always = {
        "base weights": weight_bytes(model, work),
        "LoRA factors": FLOAT32 * lora_parameters(targets, work.config.rank),
        "running SVDs": states,
    }
    waiting = work.item * sum(_entries_that_wait(block, work) for block in targets)
    renewal = max(_renewal(linear, work) for linear in layers)
    # Most of it is needed where the last block's MLP is renewed, beside the gradient of that block's output.
    folding = activations.recomputed_bytes(model, targets, work, 0) + work.tokens * model.hidden * work.item
    moments: list[Parts] = [
        {"activations": kept, "logits and loss": loss, "rows that wait": waiting},
        {"activations": kept + backward, "rows that wait": waiting},
        {"activations": kept + folding, "rows that wait": waiting, "one layer's renewal": renewal},
    ]
    if work.config.pass_counts[0] > 1:
        cast = activations.cast_bytes(targets, work, exact=False)
        summed = sides if work.init_batches > 1 else 0
        moments += [
            {"activations": kept, "logits and loss": loss, "products": summed},
            {"activations": kept + backward + cast, "products": summed},
            {"activations": backward, "products": sides},  # in the first block
        ]
    return _at_peak(always, *moments)


def _columns(linear: Linear, work: Workload) -> int:
    """Return the directions that a running SVD follows, of all copies of a layer."""
    return linear.copies * min(work.width, linear.out_features, linear.in_features)


def _length(linear: Linear) -> int:
    return linear.out_features + linear.in_features


def _entries_that_wait(block: list[Linear], work: Workload) -> int:
    """Return the entries of a block's rows that wait at most; layers that read the same activation share its rows."""
    inputs: dict[str, int] = {}
    for linear in block:
        of_layer = waiting_tokens(linear, work) * linear.in_features
        inputs[linear.reads] = max(inputs.get(linear.reads, 0), of_layer)
    return sum(inputs.values()) + sum(waiting_tokens(linear, work) * linear.out_features for linear in block)


def _renewal(linear: Linear, work: Workload) -> int:
    """Return the bytes to renew one layer's SVD: its rows, joined and in float32, and the directions found."""
    tokens = waiting_tokens(linear, work) + work.tokens * linear.rows // linear.copies
    copied = work.item != FLOAT32 or tokens > work.tokens
    k = min(work.width, linear.out_features, linear.in_features)
    return FLOAT32 * (copied * tokens + BLOCK_COPIES * k) * _length(linear)


def exact_memory(model: Architecture, targets: Targets, work: Workload) -> Parts:
    """Return the memory of the init by exact gradients.

    From a single batch it holds one gradient at a time, from several batches all of them.
    """
    total = FLOAT32 * sum(linear.weights for block in targets for linear in block)
    kept = activations.kept_bytes(model, targets, work, 0)
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
    products, dense = exact_products(linear, work.directions)
    matrix = FLOAT32 * linear.out_features * linear.in_features
    if dense:
        return SVD_COPIES * matrix
    directions = (work.directions + EXACT_OVERSAMPLE) * (products + 1) // 2
    blocks = FLOAT32 * directions * (linear.out_features + linear.in_features)
    copies = 1 if work.init_batches == 1 else 2  # the sum over the batches, and the mean
    return copies * matrix * multiplied_out(linear, work) + BLOCK_COPIES * blocks


def _at_peak(always: Parts, *moments: Parts) -> Parts:
    """Return the parts that always exist and those of the largest moment; parts of the other moments are 0."""
    names = dict.fromkeys(name for moment in moments for name in moment)
    largest = max(moments, key=lambda moment: sum(moment.values()))
    return {**always, **{name: largest.get(name, 0) for name in names}}
