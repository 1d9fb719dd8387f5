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


def block_bytes(model: Architecture, block: Block, targets: list[Linear], work: Workload, rank: int) -> int:
    """Kept by one block."""
    return work.tokens * (
        _norms(model, block, work)
        + _attention(model, work)
        + _mlp(model, block, work)
        + _lora(model, targets, work, rank)
    )


def kept_bytes(model: Architecture, targets: list[list[Linear]], work: Workload, rank: int) -> int:
    """Kept by all blocks and the last norm: what the backward pass starts with, but for the loss."""
    first_norm = _norm_item(model, work) * model.hidden * work.tokens
    blocks = [block_bytes(model, b, t, work, rank) for b, t in zip(model.blocks, targets, strict=True)]
    if not work.checkpointing:
        return sum(blocks)  # the last norm keeps what the first does not: its input, the embedding, needs no gradient
    inputs = len(blocks) * work.tokens * model.hidden * work.item
    return inputs + max(blocks) + first_norm


def loss_bytes(model: Architecture, work: Workload) -> int:
    """At the worst moment of the loss, its gradient included."""
    per_logit = LOSS_COPIES * FLOAT32 + (2 * work.item if model.softcapped else 0)
    return work.tokens * model.vocabulary * per_logit


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
