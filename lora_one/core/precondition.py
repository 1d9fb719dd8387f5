"""r x r preconditioning of a LoRA pair's gradients (LoRA-One, arXiv 2502.01235, Algorithm 1; Zhang and Pilanci 2024,
arXiv 2402.02347).

    gA <- (B^T B + reg I)^-1 gA        gB <- gB (A A^T + reg I)^-1

Both lines use the old A and B. All functions accept leading batch axes, so that many layers' pairs go together.
"""

from typing import Literal

from .arrays import diagonal
from .factors import Factors
from .ops import Array, Ops

Damping = Literal["absolute", "relative"]


def grams(ops: Ops, pair: Factors) -> tuple[Array, Array]:
    """(B^T B, A A^T), each (..., r, r), in float32 or wider. The first preconditions gA, the second gB."""
    a, b = ops.at_least_float32(pair.lora_A), ops.at_least_float32(pair.lora_B)
    return ops.matmul(ops.matrix_transpose(b), b), ops.matmul(a, ops.matrix_transpose(a))


def damped_inverse(ops: Ops, gram: Array, reg: float, damping: Damping = "absolute") -> Array:
    """(gram + reg I)^-1 of symmetric positive semidefinite matrices, by Cholesky.

    Args:
        gram: (..., r, r), float32 or wider.
        reg: the number added to the diagonal: as it is (`absolute`, the paper's form), or times the mean eigenvalue
            trace / r of each matrix (`relative`), which makes it independent of the factors' scale.

    Returns:
        (..., r, r). NaN where gram is not finite.
    """
    r = gram.shape[-1]
    identity = ops.eye(r, like=gram)
    trace = ops.sum(diagonal(ops, gram, identity), axis=-1)[..., None, None]  # (..., 1, 1)
    added = reg * trace / r if damping == "relative" else reg
    # Departure from the paper: add at least the rounding error of the Gram matrix itself. Without it a rank-deficient
    # factor of norm >> 1 has no Cholesky factor. A well-conditioned matrix hardly changes, in float64 none does.
    # The last term keeps an all-zero Gram matrix under relative damping invertible; it is far below any other reg.
    floor = 8.0 * ops.eps(gram) * trace + 1e-30
    damped = gram + (added + floor) * identity
    return ops.cholesky_solve(damped, identity)


def precondition(
    ops: Ops, pair: Factors, gradient: Factors, reg: float = 1e-6, damping: Damping = "absolute"
) -> Factors:
    """The preconditioned gradients of a pair, in float32 or wider, in the layout of `Factors`.

    Args:
        pair: lora_A (..., r, in), lora_B (..., out, r).
        gradient: the gradients of both, in the same shapes.
        reg: see `damped_inverse`.
        damping: see `damped_inverse`.
    """
    inverses = damped_inverse(ops, ops.stack(grams(ops, pair)), reg, damping)  # (2, ..., r, r): one solve
    return apply_inverses(ops, gradient, inverses[0, ...], inverses[1, ...])


def apply_inverses(ops: Ops, gradient: Factors, inverse_b: Array, inverse_a: Array) -> Factors:
    """(inverse_b gA, gB inverse_a): the second half of `precondition`, for callers that batch the inverses.

    Args:
        gradient: (gA, gB).
        inverse_b: (B^T B + reg I)^-1, (..., r, r).
        inverse_a: (A A^T + reg I)^-1, (..., r, r).
    """
    return Factors(
        ops.matmul(inverse_b, ops.at_least_float32(gradient.lora_A)),  # (..., r, in)
        ops.matmul(ops.at_least_float32(gradient.lora_B), inverse_a),  # (..., out, r)
    )
