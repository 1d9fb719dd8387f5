"""Floating-point operations of a training step and of an init, a multiplication and an addition as two."""

from dataclasses import dataclass
from typing import NamedTuple

from lora_one.core.exact import EXACT_OVERSAMPLE, plan
from lora_one.core.gradient import rows_are_smaller
from lora_one.core.sketch import REORTHOGONALIZE_THRESHOLD

from .architecture import Architecture, Block, Linear
from .workload import Workload

# Products with G, or with its transpose, until its leading triplets are exact: 8 to 24 on random Llamas, mean 14.
EXACT_PRODUCTS = 14


class Kinds(NamedTuple):
    """Operations by the rate at which they run."""

    dense: int  # products with a weight of the base model
    attention: int
    thin: int  # products with a matrix of r or k columns, in float32
    gradients: int  # whole gradients of weights, in float32

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclass(frozen=True)
class Flops:
    """Of one forward and backward pass over one batch."""

    forward: Kinds
    backward: Kinds
    again: Kinds  # forward once more, under checkpointing

    @property
    def kinds(self) -> Kinds:
        """Of all three."""
        return Kinds(*(sum(values) for values in zip(self.forward, self.backward, self.again, strict=True)))


class Decompositions(NamedTuple):
    """Operations between passes, by the rate at which they run, and how many calls they take."""

    qr: int
    svd: int  # of what is projected on all directions
    dense_svd: int  # of a whole gradient
    thin: int
    calls: int


def pass_flops(
    model: Architecture,
    targets: list[list[Linear]],
    work: Workload,
    lora: int = 0,
    sketch: int = 0,
    exact: bool = False,
) -> Flops:
    """A forward and backward pass. A frozen weight costs 2 operations a token forward and 2 backward.

    Args:
        lora: rank of the LoRA layers on the targets, which are trained; 0 without.
        sketch: columns of the products of each target's G that are formed beside the pass: G V, or Q^T G.
        exact: each target's G is formed.
    """
    tokens, embedded = work.tokens, "attention input"
    head = 2 * tokens * model.hidden * model.vocabulary
    base = 2 * tokens * sum(linear.used_weights for block in model.blocks for linear in block.linears)
    # Nothing below the first block's first layers needs a gradient.
    stops = 2 * tokens * sum(x.used_weights for x in model.blocks[0].linears if x.reads == embedded)
    attention = sum(_attention(model, block, work) for block in model.blocks)
    forward = backward = gradients = 0
    for index, block in enumerate(targets):
        for x in block:
            outer, inner = 2 * tokens * x.rows * x.out_features, 2 * tokens * x.rows * x.in_features
            forward += lora * (outer + inner)
            # Through B always, through A unless the embedding is all that is below; and a gradient a factor.
            backward += lora * (outer + (0 if index == 0 and x.reads == embedded else inner) + outer + inner)
            backward += sketch * (outer + inner)
            gradients += 2 * tokens * x.used_weights * (exact and multiplied_out(x, work))
    return Flops(
        Kinds(base + head, attention, forward, 0),
        Kinds(base + head - stops, 2 * attention, backward, gradients),
        Kinds(base, attention, forward, 0) if work.checkpointing else Kinds(0, 0, 0, 0),
    )


def _attention(model: Architecture, block: Block, work: Workload) -> int:
    """Scores and their product with the values, over the whole square of positions; half of it is masked."""
    seen = work.seq_len if work.attention == "eager" else min(work.seq_len, block.window or work.seq_len)
    return 4 * work.tokens * seen * model.heads * model.head_dim


def sketch_flops(targets: list[list[Linear]], work: Workload) -> Decompositions:
    """Between all passes of the sketch, and in its end, on all targets."""
    every = [x for block in targets for x in block]
    return _all_of([(x.copies, _sketch(x, work.config.rank, work.width, work.config.pass_counts[0])) for x in every])


def exact_flops(targets: list[list[Linear]], work: Workload) -> Decompositions:
    """From all targets' gradients to their triplets: by block Golub-Kahan, or a dense SVD where that does not pay."""
    return _all_of([(x.copies, _exact(x, work)) for block in targets for x in block])


def multiplied_out(linear: Linear, work: Workload) -> bool:
    """Whether an exact init forms a target's G: not from a single batch of so few tokens that its rows are smaller."""
    smaller = rows_are_smaller(_tokens(linear, work), linear.out_features, linear.in_features)
    return work.init_batches > 1 or not smaller or exact_products(linear, work.config.rank)[1]


def _tokens(linear: Linear, work: Workload) -> int:
    """That pass each of its copies."""
    return work.tokens * linear.rows // linear.copies


def exact_products(linear: Linear, rank: int) -> tuple[int, bool]:
    """Products with a target's G, and whether it takes the dense SVD: in their place, or after them."""
    found = plan((linear.out_features, linear.in_features), rank)
    if found is None:
        return 0, True
    width, limit = found
    return min(EXACT_PRODUCTS, 2 * (limit // width)), EXACT_PRODUCTS * width > 2 * limit


def _exact(linear: Linear, work: Workload) -> Decompositions:
    n, m = sorted((linear.out_features, linear.in_features))
    products, dense = exact_products(linear, work.config.rank)
    k = work.config.rank + EXACT_OVERSAMPLE
    qr = svd = thin = 0
    entries, tokens = m * n, _tokens(linear, work)
    if not multiplied_out(linear, work):
        entries = tokens * (m + n)
        thin += 2 * tokens * entries  # the norm
    for number in range(1, products + 1):
        known = k * (number // 2)  # on the side of what the product yields
        rows = (n + m) // 2  # by turns
        qr += 2 * 4 * rows * k * k
        thin += 2 * entries * k + 4 * rows * k * (known + min(k, known))  # projected on the last block, and on all
        if number % 2 == 0:  # of what G is in the bases so far
            svd += 22 * known**3
    found = Decompositions(qr, svd, 0, thin, products * _CALLS_A_PRODUCT)
    if dense:  # QR and 22 n^3 (Golub and Van Loan, 4th ed., figure 8.6.1)
        found = _sum(found, _NOTHING._replace(dense_svd=22 * n**3 + (6 * m * n * n if m > n else 0), calls=6))
    return found


_NOTHING = Decompositions(0, 0, 0, 0, 0)
_CALLS_A_PASS, _CALLS_AT_THE_END, _CALLS_A_PRODUCT = 32, 119, 38  # as torch dispatches them


def _sketch(linear: Linear, rank: int, width: int, passes: int) -> Decompositions:
    """QRs (Householder: 4 m k^2 for a thin Q of (m, k)), projections on earlier blocks, SVDs of what G is in them."""
    k = min(width, linear.out_features, linear.in_features)
    known = [0, 0]
    qr, svd, thin, calls = 4 * linear.in_features * k * k, 0, 0, passes * _CALLS_A_PASS  # the QR is omega's
    for number in range(1, passes + 1):
        side = number % 2  # odd passes yield directions of the outputs, even ones of the inputs
        rows = linear.out_features if side else linear.in_features
        rounds = 1 if not known[side] else 3 if REORTHOGONALIZE_THRESHOLD * (known[side] + k) > rows else 2
        qr += rounds * 4 * rows * k * k
        thin += rounds * 4 * rows * k * known[side] + 2 * rows * k * k  # and the new block's coordinates
        known[side] += k
    for number in range(max(1, passes - 3), passes + 1):  # in the end; also what the last three passes have changed
        each = 22 if number == passes else 11  # singular values alone
        svd += each * (k * ((number + 1) // 2)) ** 3
    thin += 2 * rank * (linear.out_features * known[1] + linear.in_features * known[0])
    return Decompositions(qr, svd, 0, thin, calls + _CALLS_AT_THE_END)


def _all_of(counted: list[tuple[int, Decompositions]]) -> Decompositions:
    return _sum(*(Decompositions(*(copies * value for value in each)) for copies, each in counted))


def _sum(*counts: Decompositions) -> Decompositions:
    return Decompositions(*(sum(values) for values in zip(_NOTHING, *counts, strict=True)))


def precondition_flops(targets: list[list[Linear]], rank: int) -> int:
    """Both Grams, both products, and two inverses by Cholesky."""
    return sum(
        x.copies * (4 * rank * rank * (x.out_features + x.in_features) + 4 * rank**3)
        for block in targets
        for x in block
    )
