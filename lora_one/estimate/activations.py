"""What a forward pass keeps for the backward pass of LoRA, and what the loss needs, in bytes.

The base weights are frozen, so a linear layer keeps its input only where LoRA's factor A needs it for its gradient. The
counts are those of transformers' PyTorch models with PEFT's layers; a test holds them to what autograd really saves.
"""

from .architecture import Architecture, Block, Linear
from .workload import Workload

FLOAT32 = 4
# Tensors of the MLP's width that an activation function keeps: written as one kernel, its input; GPT-2's gelu is not.
SAVED_BY = {"gelu_new": 4, "quick_gelu": 3}
# The log-softmax that is kept, the loss's gradient with respect to it, and the one with respect to the logits.
LOSS_COPIES = 3
LOSS_CHUNK = 2**24  # of logits in float32: what an init's passes take the loss of at once


def block_bytes(model: Architecture, block: Block, targets: list[Linear], work: Workload, rank: int) -> int:
    """Kept by one block."""
    return work.tokens * (
        _norms(model, block, work)
        + _attention(model, work)
        + _mlp(model, block, work)
        + _lora(model, targets, work, rank)
    )


def block_total(model: Architecture, targets: list[list[Linear]], work: Workload, rank: int) -> int:
    """Kept by all blocks and the last norm, without checkpointing."""
    # The last norm keeps what the first does not: its input, the embedding, needs no gradient.
    return sum(block_bytes(model, b, t, work, rank) for b, t in zip(model.blocks, targets, strict=True))


def kept_bytes(model: Architecture, targets: list[list[Linear]], work: Workload, rank: int) -> int:
    """Kept by all blocks and the last norm: what the backward pass starts with, but for the loss."""
    if not work.checkpointing:
        return block_total(model, targets, work, rank)
    return work.tokens * model.hidden * (len(model.blocks) * work.item + _norm_item(model, work))


def recomputed_bytes(model: Architecture, targets: list[list[Linear]], work: Workload, rank: int) -> int:
    """One block's, while the backward pass is in it; they come when the loss's are gone. 0 without checkpointing."""
    if not work.checkpointing:
        return 0
    return max(block_bytes(model, b, t, work, rank) for b, t in zip(model.blocks, targets, strict=True))


def backward_bytes(model: Architecture, targets: list[list[Linear]], work: Workload, rank: int) -> int:
    """What the backward pass adds to what is kept, once the loss's are gone: a block's, and gradients on their way."""
    width = work.tokens * max(block.mlp_width for block in model.blocks)
    # Of the gate's and of the up layer's output; PEFT's factors have theirs in float32 beside them.
    passing = 2 * width * (work.item + (FLOAT32 if rank and work.item != FLOAT32 else 0))
    return recomputed_bytes(model, targets, work, rank) + passing


def tapped_bytes(model: Architecture, targets: list[list[Linear]], work: Workload, columns: int) -> int:
    """`kept_bytes` with a tap on each target in the place of LoRA.

    Args:
        columns: of the product with its input that each tap keeps, in float32; 0: it keeps the input itself.
    """
    if not columns or work.checkpointing:
        return kept_bytes(model, targets, work, 0)
    products = FLOAT32 * columns * work.tokens * sum(x.rows for block in targets for x in block)
    return kept_bytes(model, [[] for _ in model.blocks], work, 0) + products


def cast_bytes(targets: list[list[Linear]], work: Workload, exact: bool) -> int:
    """What a tap takes while it forms its product: its layer's input and output gradient in float32, for a sketch one
    after the other. (On a GPU, which multiplies narrow floats, nothing.)
    """
    if work.item == FLOAT32:
        return 0
    held = sum if exact else max
    return FLOAT32 * work.tokens * max(x.rows * held((x.in_features, x.out_features)) for b in targets for x in b)


def loss_bytes(model: Architecture, work: Workload) -> int:
    """At the worst moment of the loss, its gradient included."""
    per_logit = LOSS_COPIES * FLOAT32 + (2 * work.item if model.softcapped else 0)
    return work.tokens * model.vocabulary * per_logit


def loss_by_rows_bytes(model: Architecture, work: Workload) -> int:
    """The same in an init's passes: the logits and their gradient, in the model's dtype, and a few rows in float32."""
    logits = work.tokens * model.vocabulary
    copies = (1 if work.item == FLOAT32 else 2) * min(LOSS_CHUNK, FLOAT32 * logits)
    return logits * work.item * (4 if model.softcapped else 2) + copies


def _norm_item(model: Architecture, work: Workload) -> int:
    return FLOAT32 if model.family.norm == "rms" else work.item


def _norms(model: Architecture, block: Block, work: Workload) -> int:
    # An RMS norm keeps its input in float32 and a number a row; a layer norm its input as it is and two.
    rows = model.family.norms
    if len(block.norm_inputs) > rows:
        rows += model.heads + model.kv_heads
    per_row = FLOAT32 * (1 if model.family.norm == "rms" else 2)
    return _norm_item(model, work) * sum(block.norm_inputs) + per_row * rows


def _attention(model: Architecture, work: Workload) -> int:
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if work.attention == "sdpa":  # q, k, v, its output and the log-sum-exp of each row
        values = q + 2 * kv if model.family.fused_qkv else kv  # a view keeps all of what it is a part of
        return work.item * (2 * q + kv + values) + FLOAT32 * model.heads
    # q, and k and v once a head; the probabilities in float32, and cast where the model is not
    probabilities = FLOAT32 + (work.item if work.item != FLOAT32 else 0)
    return work.item * 3 * q + probabilities * model.heads * work.seq_len


def _mlp(model: Architecture, block: Block, work: Workload) -> int:
    kept = SAVED_BY.get(model.activation, 1)
    if model.family.mlp != "plain":
        kept += 2  # both factors of act(gate) * up
    routed = work.item * kept * (block.mlp_width + block.shared_width)
    experts = next((x for x in block.linears if x.copies > 1), None)
    if experts is not None:
        # The experts' outputs are kept too, since their weights depend on the router's input; so is its softmax.
        routed += work.item * experts.rows * model.hidden + 2 * FLOAT32 * experts.copies
    if block.shared_width:
        routed += work.item * model.hidden
    return routed


def _lora(model: Architecture, targets: list[Linear], work: Workload, rank: int) -> int:
    """The targets' inputs: for A's gradient, or at rank 0 for the weight's own; and A x for B's."""
    if rank and work.item != FLOAT32:  # each layer casts its input for itself
        return FLOAT32 * sum(x.rows * (x.in_features + rank) for x in targets)
    inputs = {x.reads: x.rows * x.in_features for x in targets}  # layers that read the same tensor share it
    if work.attention == "sdpa" and not model.family.joined_rotation:
        # Kept already: sdpa writes its output as q lies, by token as a rule, and o_proj reads just that.
        inputs.pop("attention output", None)
    return work.item * sum(inputs.values()) + FLOAT32 * rank * sum(x.rows for x in targets)
