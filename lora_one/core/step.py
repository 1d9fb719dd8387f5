"""One preconditioned step of a LoRA pair, by gradient descent or by AdamW: the spec of every optimizer.

A backend's optimizer preconditions with `lora_one.core.precondition` and leaves the rest to its framework's own AdamW.
This file defines the result that the two together must give.
"""

from typing import NamedTuple

from .factors import Factors
from .ops import Array, Ops
from .precondition import Damping, precondition


class Moments(NamedTuple):
    """Adam's running means of one array's gradient and of its square, in float32 or wider, and the number of steps."""

    steps: int
    mean: Array  # shape of the parameter
    square: Array  # shape of the parameter


class PairState(NamedTuple):
    """AdamW's state for a LoRA pair."""

    lora_A: Moments
    lora_B: Moments


def start_moments(ops: Ops, parameter: Array) -> Moments:
    zero = ops.zeros(tuple(parameter.shape), like=ops.at_least_float32(parameter))
    return Moments(0, zero, zero)


def start_pair(ops: Ops, pair: Factors) -> PairState:
    """The state before the first step: zero moments for both factors."""
    return PairState(start_moments(ops, pair.lora_A), start_moments(ops, pair.lora_B))


def gradient_descent(
    ops: Ops,
    pair: Factors,
    gradient: Factors,
    learning_rate: float,
    reg: float | None = 1e-6,
    damping: Damping = "absolute",
) -> Factors:
    """A <- A - lr (B^T B + reg I)^-1 gA and B <- B - lr gB (A A^T + reg I)^-1, both from the old pair.

    This is the iteration of the paper's theory (arXiv 2502.01235, its preconditioned gradient descent). `reg=None`
    leaves the preconditioner out.
    """
    direction = _direction(ops, pair, gradient, reg, damping)
    return Factors(
        _add(ops, pair.lora_A, -learning_rate * direction.lora_A),
        _add(ops, pair.lora_B, -learning_rate * direction.lora_B),
    )


def adamw(
    ops: Ops,
    pair: Factors,
    gradient: Factors,
    state: PairState,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    reg: float | None = 1e-6,
    damping: Damping = "absolute",
) -> tuple[Factors, PairState]:
    """AdamW on the preconditioned gradients (arXiv 2502.01235, Algorithm 1), as torch.optim.AdamW computes it.

    It has Adam's bias correction and decoupled weight decay: p <- (1 - lr wd) p before the step. `reg=None` leaves the
    preconditioner out.

    Returns:
        The new pair, in the dtype of the old one, and the new state.
    """
    direction = _direction(ops, pair, gradient, reg, damping)
    lora_A, state_A = _adamw(ops, pair.lora_A, direction.lora_A, state.lora_A, learning_rate, betas, eps, weight_decay)
    lora_B, state_B = _adamw(ops, pair.lora_B, direction.lora_B, state.lora_B, learning_rate, betas, eps, weight_decay)
    return Factors(lora_A, lora_B), PairState(state_A, state_B)


def _direction(ops: Ops, pair: Factors, gradient: Factors, reg: float | None, damping: Damping) -> Factors:
    if reg is None:
        return Factors(ops.at_least_float32(gradient.lora_A), ops.at_least_float32(gradient.lora_B))
    return precondition(ops, pair, gradient, reg, damping)


def _adamw(
    ops: Ops,
    parameter: Array,
    gradient: Array,
    moments: Moments,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Array, Moments]:
    steps = moments.steps + 1
    mean = betas[0] * moments.mean + (1.0 - betas[0]) * gradient
    square = betas[1] * moments.square + (1.0 - betas[1]) * (gradient * gradient)
    corrected_mean = mean / (1.0 - betas[0] ** steps)
    corrected_square = square / (1.0 - betas[1] ** steps)
    step = corrected_mean / (ops.sqrt(corrected_square) + eps)
    wide = ops.at_least_float32(parameter) * (1.0 - learning_rate * weight_decay)
    return ops.astype(wide - learning_rate * step, parameter.dtype), Moments(steps, mean, square)


def _add(ops: Ops, parameter: Array, update: Array) -> Array:
    return ops.astype(ops.at_least_float32(parameter) + update, parameter.dtype)
