"""The activations that a forward pass keeps for the backward pass of LoRA, and the memory of the loss, in bytes.

The base weights are frozen. So a linear layer keeps its input only if the gradient of LoRA's factor A needs it. The
counts are those of transformers' PyTorch models with PEFT's layers; a test compares them with what autograd saves.
"""

from .architecture import Architecture, Block, Linear, Targets
from .workload import FLOAT32, Workload

# Number of tensors of the MLP's width that an activation function keeps. A single kernel keeps its input only.
SAVED_BY = {"gelu_new": 4, "quick_gelu": 3}
# The kept log-softmax, the loss's gradient with respect to it, and the gradient with respect to the logits.
LOSS_COPIES = 3
LOSS_CHUNK = 2**24  # bytes of float32 logits whose loss an init computes at once


def block_bytes(model: Architecture, block: Block, targets: list[Linear], work: Workload, rank: int) -> int:
    """Return the bytes that one block keeps."""
    return work.tokens * (
        _norms(model, block, work)
        + _attention(model, work)
        + _mlp(model, block, work)
        + _lora(model, targets, work, rank)
    )


def block_total(model: Architecture, targets: Targets, work: Workload, rank: int) -> int:
    """Return the bytes that all blocks and the last norm keep without checkpointing."""
    # The first norm's input, the embedding, needs no gradient and is not kept. The last norm's input has its size.
    return sum(_per_block(model, targets, work, rank))


def kept_bytes(model: Architecture, targets: Targets, work: Workload, rank: int) -> int:
    """Return the bytes that all blocks and the last norm keep until the backward pass begins, without the loss."""
    if not work.checkpointing:
        return block_total(model, targets, work, rank)
    return work.tokens * model.hidden * (len(model.blocks) * work.item + _norm_item(model, work))


def recomputed_bytes(model: Architecture, targets: Targets, work: Workload, rank: int) -> int:
    """Return the bytes of the largest block's recomputed activations; 0 without checkpointing.

    They exist while the backward pass is in that block. The loss's tensors are freed by then.
    """
    return max(_per_block(model, targets, work, rank)) if work.checkpointing else 0


def backward_bytes(model: Architecture, targets: Targets, work: Workload, rank: int) -> int:
    """Return the bytes that the backward pass adds to the kept ones after the loss's tensors are freed.

    These are a block's recomputed activations, and gradients that exist for a moment.
    """
    width = work.tokens * max(block.mlp_width for block in model.blocks)
    # The gradients of the outputs of gate and up. PEFT's factors have them in float32 as well.
    passing = 2 * width * (work.item + (FLOAT32 if rank and work.item != FLOAT32 else 0))
    return recomputed_bytes(model, targets, work, rank) + passing


def cast_bytes(targets: Targets, work: Workload, exact: bool) -> int:
    """Return the bytes of the float32 casts of a layer's input and output gradient that a tap multiplies.

    A sketch makes one cast after the other. GPUs multiply narrow floats and need none: this counts the CPU's.
    """
    if work.item == FLOAT32:
        return 0
    held = sum if exact else max
    return (
        FLOAT32
        * work.tokens
        * max(linear.rows * held((linear.in_features, linear.out_features)) for block in targets for linear in block)
    )


def loss_bytes(model: Architecture, work: Workload) -> int:
    """Return the bytes of logits and loss at their peak, the gradient included."""
    per_logit = LOSS_COPIES * FLOAT32 + (2 * work.item if model.softcapped else 0)
    return work.tokens * model.vocabulary * per_logit


def loss_by_rows_bytes(model: Architecture, work: Workload) -> int:
    """Return the same for an init, which computes the loss of a few rows at a time.

    It holds the logits and their gradient in the model's dtype, and a chunk of rows in float32.
    """
    logits = work.tokens * model.vocabulary
    copies = (1 if work.item == FLOAT32 else 2) * min(LOSS_CHUNK, FLOAT32 * logits)
    return logits * work.item * (4 if model.softcapped else 2) + copies


def _per_block(model: Architecture, targets: Targets, work: Workload, rank: int) -> list[int]:
    pairs = zip(model.blocks, targets, strict=True)
    return [block_bytes(model, block, linears, work, rank) for block, linears in pairs]


def _norm_item(model: Architecture, work: Workload) -> int:
    """Return the bytes per number of a norm's kept input."""
    return FLOAT32 if model.family.norm == "rms" else work.item


def _norms(model: Architecture, block: Block, work: Workload) -> int:
    """Return the bytes per token that the norms keep.

    An RMS norm keeps its input in float32 and one number per row; a layer norm its input as it is and two numbers.
    """
    rows = model.family.norms
    if len(block.norm_inputs) > rows:
        rows += model.heads + model.kv_heads
    per_row = FLOAT32 * (1 if model.family.norm == "rms" else 2)
    return _norm_item(model, work) * sum(block.norm_inputs) + per_row * rows


def _attention(model: Architecture, work: Workload) -> int:
    """Return the bytes per token that attention keeps."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if work.attention == "sdpa":  # q, k, v, its output, and the log-sum-exp of each row
        values = q + 2 * kv if model.family.fused_qkv else kv  # a view keeps the whole tensor that it is a part of
        return work.item * (2 * q + kv + values) + FLOAT32 * model.heads
    # q, k and v repeated for each head; the probabilities in float32, and cast unless the model is float32
    probabilities = FLOAT32 + (work.item if work.item != FLOAT32 else 0)
    return work.item * 3 * q + probabilities * model.heads * work.seq_len


def _mlp(model: Architecture, block: Block, work: Workload) -> int:
    """Return the bytes per token that the MLP keeps."""
    tensors = SAVED_BY.get(model.activation, 1)
    if model.family.mlp != "plain":
        tensors += 2  # both factors of act(gate) * up
    kept = work.item * tensors * (block.mlp_width + block.shared_width)
    experts = next((linear for linear in block.linears if linear.copies > 1), None)
    if experts is not None:
        # The experts' outputs are also kept, since their weights depend on the router's input; so is its softmax.
        kept += work.item * experts.rows * model.hidden + 2 * FLOAT32 * experts.copies
    if block.shared_width:
        kept += work.item * model.hidden
    return kept


def _lora(model: Architecture, targets: list[Linear], work: Workload, rank: int) -> int:
    """Return the bytes per token that LoRA keeps: the targets' inputs for A's gradient, and A x for B's.

    At rank 0 the inputs are kept for the gradient of the weight itself.
    """
    if rank and work.item != FLOAT32:  # each layer makes its own float32 copy of its input
        return FLOAT32 * sum(linear.rows * (linear.in_features + rank) for linear in targets)
    inputs = {linear.reads: linear.rows * linear.in_features for linear in targets}  # shared by layers that read it
    if work.attention == "sdpa" and not model.family.joined_rotation:
        # sdpa keeps its output, in q's memory layout. That is usually by token, just what o_proj reads.
        inputs.pop("attention output", None)
    return work.item * sum(inputs.values()) + FLOAT32 * rank * sum(linear.rows for linear in targets)
