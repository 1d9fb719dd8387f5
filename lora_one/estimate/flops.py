"""The floating-point operations of a training step and of an init. A multiplication and an addition count as two."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lora_one.core.bases import REORTHOGONALIZE_THRESHOLD
from lora_one.core.exact import EXACT_OVERSAMPLE, is_multiplied
from lora_one.core.fold import PRODUCTS, TEST_COLUMNS
from lora_one.core.gradient import rows_are_smaller
from lora_one.core.krylov import CHECKS

from .architecture import Architecture, Block, Linear, Targets
from .workload import FLOAT32, Workload

# Typical number of products with G, or its transpose, until its leading triplets hold enough. On random Llamas 9 of 10
# layers stop at this, the first check, and the others at the second.
EXACT_PRODUCTS = 2 * CHECKS[0]
WAITING_SHARE = 0.5  # of the bytes of G in float32: what a layer's rows may need before they are folded
WAITING_BYTES = 2**22  # what they may need in any case
# Per layer, as torch dispatches them.
CALLS_PER_RENEWAL, CALLS_PER_READING, CALLS_AT_END, CALLS_PER_PRODUCT = 207, 95, 94, 38


class FlopsByRate(NamedTuple):
    """Operations, grouped by the rate at which they run.

    Attributes:
        dense: products with a weight of the base model.
        attention: scores, and their product with the values.
        thin: products with a matrix of r or k columns, in float32.
        gradients: whole gradients of weights, in float32.
    """

    dense: int
    attention: int
    thin: int
    gradients: int

    @property
    def total(self) -> int:
        """Number of all operations."""
        return sum(self)


@dataclass(frozen=True)
class Flops:
    """Operations of one forward and backward pass over one batch.

    Attributes:
        recomputed: the second forward pass with checkpointing.
    """

    forward: FlopsByRate
    backward: FlopsByRate
    recomputed: FlopsByRate

    @property
    def by_rate(self) -> FlopsByRate:
        """The sum of all three."""
        return FlopsByRate(*(sum(values) for values in zip(self.forward, self.backward, self.recomputed, strict=True)))


class Decompositions(NamedTuple):
    """Operations between passes, grouped by the rate at which they run, and the number of the framework's calls.

    Attributes:
        svd: of small matrices: G projected on all directions so far.
        dense_svd: of whole gradients.
        thin: products with few columns.
    """

    qr: int = 0
    svd: int = 0
    dense_svd: int = 0
    thin: int = 0
    calls: int = 0


def pass_flops(
    model: Architecture, targets: Targets, work: Workload, lora: int = 0, sketch: int = 0, exact: bool = False
) -> Flops:
    """Return the operations of a forward and backward pass.

    A frozen weight costs 2 operations per token in the forward pass and 2 in the backward pass.

    Args:
        lora: rank of the trained LoRA layers on the targets; 0 for none.
        sketch: columns of the products with each target's G that the pass also computes, on both sides together.
        exact: the pass also computes each target's G.
    """
    tokens, embedded = work.tokens, "attention input"
    head = 2 * tokens * model.hidden * model.vocabulary
    base = 2 * tokens * sum(linear.used_weights for block in model.blocks for linear in block.linears)
    # The first layers of the first block read the embedding, which needs no gradient.
    skipped = 2 * tokens * sum(linear.used_weights for linear in model.blocks[0].linears if linear.reads == embedded)
    attention = sum(_attention(model, block, work) for block in model.blocks)
    forward = backward = gradients = 0
    for index, block in enumerate(targets):
        for linear in block:
            outer, inner = 2 * tokens * linear.rows * linear.out_features, 2 * tokens * linear.rows * linear.in_features
            forward += lora * (outer + inner)
            # Through B, through A unless the layer reads the embedding, and the gradients of both factors.
            through_a = 0 if index == 0 and linear.reads == embedded else inner
            backward += lora * (outer + through_a + outer + inner)
            backward += sketch * (outer + inner)
            gradients += 2 * tokens * linear.used_weights * (exact and multiplied_out(linear, work))
    return Flops(
        FlopsByRate(base + head, attention, forward, 0),
        FlopsByRate(base + head - skipped, 2 * attention, backward, gradients),
        FlopsByRate(base, attention, forward, 0) if work.checkpointing else FlopsByRate(0, 0, 0, 0),
    )


def _attention(model: Architecture, block: Block, work: Workload) -> int:
    """Return the operations of scores and their product with the values, masked positions included."""
    seen = work.seq_len if work.attention == "eager" else min(work.seq_len, block.window or work.seq_len)
    return 4 * work.tokens * seen * model.heads * model.head_dim


def multiplied_out(linear: Linear, work: Workload) -> bool:
    """Return whether an exact init forms a target's G as a matrix.

    From a single batch it keeps the factors of G = dy^T x if they are smaller and products with G are enough.
    """
    smaller = rows_are_smaller(_tokens_per_copy(linear, work), linear.out_features, linear.in_features)
    return work.init_batches > 1 or not smaller or exact_products(linear, work.directions)[1]


def _tokens_per_copy(linear: Linear, work: Workload) -> int:
    return work.tokens * linear.rows // linear.copies


def exact_products(linear: Linear, rank: int) -> tuple[int, bool]:
    """Return the number of products with a target's G, and whether a dense SVD is made instead."""
    is_dense = not is_multiplied((linear.out_features, linear.in_features), rank)
    return 0 if is_dense else EXACT_PRODUCTS, is_dense


def exact_flops(targets: Targets, work: Workload) -> Decompositions:
    """Return the operations from all targets' gradients to their triplets.

    They are found by block Golub-Kahan, or by a dense SVD where that is faster.
    """
    return _sum(_times(linear.copies, _exact(linear, work)) for block in targets for linear in block)


def _exact(linear: Linear, work: Workload) -> Decompositions:
    n, m = sorted((linear.out_features, linear.in_features))
    products, dense = exact_products(linear, work.directions)
    k = work.directions + EXACT_OVERSAMPLE
    qr = svd = thin = 0
    entries, tokens = m * n, _tokens_per_copy(linear, work)
    if not multiplied_out(linear, work):
        entries = tokens * (m + n)
        thin += 2 * tokens * entries  # the norm
    for number in range(1, products + 1):
        basis = k * (number // 2)  # directions so far on the side of the product
        rows = (n + m) // 2  # the sides alternate
        qr += 2 * 4 * rows * k * k
        thin += 2 * entries * k + 4 * rows * k * (basis + min(k, basis))  # projected on the last block, then on all
        if number % 2 == 0 and number // 2 in CHECKS:  # of G in the bases so far
            svd += 22 * basis**3
    dense_svd = 0
    calls = products * CALLS_PER_PRODUCT
    if dense:  # QR and 22 n^3 (Golub and Van Loan, 4th ed., figure 8.6.1)
        dense_svd = 22 * n**3 + (6 * m * n * n if m > n else 0)
        calls += 6
    return Decompositions(qr, svd, dense_svd, thin, calls)


def batches_of_renewal(linear: Linear, work: Workload) -> int:
    """Return how many batches' rows of a layer are folded together: what half of G's memory or 4 MiB hold."""
    of_batch = work.item * _tokens_per_copy(linear, work) * (linear.out_features + linear.in_features)
    due = max(WAITING_BYTES, WAITING_SHARE * FLOAT32 * linear.out_features * linear.in_features)
    return min(work.init_batches, max(1, math.ceil(due / max(1, of_batch))))


def waiting_tokens(linear: Linear, work: Workload) -> int:
    """Return the most tokens whose rows wait when a batch begins, of all copies of a layer."""
    return work.tokens * linear.rows * (batches_of_renewal(linear, work) - 1)


def sketch_flops(targets: Targets, work: Workload) -> Decompositions:
    """Return the operations that renew the running SVDs in the first pass and after each further one, for all targets.

    A Householder QR costs 4 m k^2 for a thin Q of shape (m, k), and 22 n^3 an SVD.
    """
    return _sum(_times(linear.copies, _sketch(linear, work)) for block in targets for linear in block)


def _sketch(linear: Linear, work: Workload) -> Decompositions:
    out, inner = linear.out_features, linear.in_features
    k = min(work.width, out, inner)
    renewals = -(-work.init_batches // batches_of_renewal(linear, work))
    qr = thin = 0
    basis = [0, k]  # directions of the outputs and of the inputs so far
    for number in range(PRODUCTS):
        side = number % 2
        rows, known = (inner if side else out), basis[side]
        rounds = 1 if not known else 3 if REORTHOGONALIZE_THRESHOLD * (known + k) > rows else 2
        qr += rounds * 4 * rows * k * k
        thin += rounds * 4 * rows * k * known + 2 * rows * k * k  # and the new block's coordinates
        thin += 4 * k * k * (out + inner)  # the product with the SVD so far
        basis[side] += k
    thin += 2 * k * (out * basis[0] + inner * basis[1])  # the new directions
    svd = 22 * basis[0] ** 3
    tokens = work.init_batches * _tokens_per_copy(linear, work)
    products = 2 * tokens * (PRODUCTS * k + TEST_COLUMNS) * (out + inner)
    further = work.config.pass_counts[0] - 1
    return Decompositions(
        renewals * qr + further * 2 * 4 * k * k * (out + inner),
        renewals * svd + further * 22 * (2 * k) ** 3,
        0,
        renewals * thin + products + further * 14 * k * k * (out + inner),
        renewals * CALLS_PER_RENEWAL + further * CALLS_PER_READING + CALLS_AT_END,
    )


def precondition_flops(targets: Targets, rank: int) -> int:
    """Return the operations of both Gram matrices, both products and two inverses by Cholesky, for all targets."""
    return sum(
        linear.copies * (4 * rank * rank * (linear.out_features + linear.in_features) + 4 * rank**3)
        for block in targets
        for linear in block
    )


def _times(copies: int, count: Decompositions) -> Decompositions:
    return Decompositions(*(copies * value for value in count))


def _sum(counts: Iterable[Decompositions]) -> Decompositions:
    return Decompositions(*(sum(values) for values in zip(Decompositions(), *counts, strict=True)))
