"""Floating-point operations of a training step and of an init, a multiplication and an addition as two."""

from dataclasses import dataclass

from .architecture import Architecture, Block, Linear
from .workload import Workload


@dataclass(frozen=True)
class Flops:
    """Of one forward and backward pass over one batch."""

    forward: int
    backward: int
    again: int  # forward once more, under checkpointing

    @property
    def total(self) -> int:
        """All three."""
        return self.forward + self.backward + self.again


def pass_flops(
    model: Architecture,
    targets: list[list[Linear]],
    work: Workload,
    rank: int,
    gradients: int = 2,
    weights: bool = False,
) -> Flops:
    """A forward and backward pass with LoRA of a rank on the targets; of rank 0, without.

    A frozen weight costs 2 operations a token forward and 2 backward (its input's gradient alone); a trained one 4.

    Args:
        gradients: how many of the pair's two factors want a gradient: 2 in training, 1 in a pass of the sketch.
        weights: the targets' own gradients are formed as well: the exact init, and LoRA-GA.
    """
    tokens, reads_embedding = work.tokens, "attention input"
    base = sum(linear.used_weights for block in model.blocks for linear in block.linears)
    base += model.hidden * model.vocabulary
    forward = backward = 2 * tokens * base
    # Nothing below the first block's first layers needs a gradient.
    backward -= 2 * tokens * sum(x.used_weights for x in model.blocks[0].linears if x.reads == reads_embedding)
    attention = sum(_attention(model, block, work) for block in model.blocks)
    forward, backward = forward + attention, backward + 2 * attention
    for index, block in enumerate(targets):
        for x in block:
            pair = 2 * tokens * rank * x.rows * (x.in_features + x.out_features)
            forward += pair
            # Through B always, through A unless the embedding is all that is below; and a gradient a factor.
            below = 0 if index == 0 and x.reads == reads_embedding else x.in_features
            backward += 2 * tokens * rank * x.rows * (x.out_features + below)
            backward += gradients * pair // 2
            if weights:
                backward += 2 * tokens * x.used_weights
    blocks_forward = forward - 2 * tokens * model.hidden * model.vocabulary
    return Flops(forward, backward, blocks_forward if work.checkpointing else 0)


def _attention(model: Architecture, block: Block, work: Workload) -> int:
    """Scores and their product with the values, over the whole square of positions; half of it is masked."""
    seen = work.seq_len if work.attention == "eager" else min(work.seq_len, block.window or work.seq_len)
    return 4 * work.tokens * seen * model.heads * model.head_dim


def sketch_flops(targets: list[list[Linear]], work: Workload) -> int:
    """QR and projections between all passes, and the last SVD (Householder: 4 m k^2 for a thin Q of (m, k))."""
    total = 0
    for x in (x for block in targets for x in block):
        k = min(work.width, x.out_features, x.in_features)
        known = {0: 0, 1: 0}
        count = 4 * x.in_features * k * k  # of omega
        for number in range(1, work.config.passes + 1):
            side = number % 2  # odd passes yield directions of the outputs, even ones of the inputs
            rows = x.out_features if side else x.in_features
            rounds = 3 if known[side] else 1
            count += rounds * (4 * rows * k * k + 4 * rows * k * known[side])
            known[side] += k
        columns = k * ((work.config.passes + 1) // 2)
        count += 6 * max(x.out_features, x.in_features) * columns * columns + 22 * columns**3
        total += x.copies * count
    return total


def exact_flops(targets: list[list[Linear]]) -> int:
    """A dense thin SVD of each gradient: QR and 22 n^3 (Golub and Van Loan, 4th ed., figure 8.6.1)."""
    total = 0
    for x in (x for block in targets for x in block):
        n, m = sorted((x.out_features, x.in_features))
        total += x.copies * (22 * n**3 + (6 * m * n * n if m > n else 0))
    return total


def precondition_flops(targets: list[list[Linear]], rank: int) -> int:
    """Both Grams, both products, and two inverses by Cholesky."""
    return sum(
        x.copies * (4 * rank * rank * (x.out_features + x.in_features) + 4 * rank**3)
        for block in targets
        for x in block
    )
