"""The update rules that are compared: where, in a step of Adam or of momentum SGD, the r x r preconditioner acts.

With P = ((B^T B + reg I)^-1, (A A^T + reg I)^-1) from the old pair, and gradients g of it:

    before   the moments are those of P g                       the paper (arXiv 2502.01235, Algorithm 1), PEFT
    mean     the first moment of g is preconditioned, then divided by the root of the second moment of g
    after    the finished direction of plain Adam is preconditioned
    basis    the second moment is kept in the coordinates in which P is the identity: of P^1/2 g. The first moment goes
             there, is divided, and comes back: P^1/2 ((P^1/2 m) / sqrt(v))

`none` is the plain optimizer, and what the library's core says a step must be: `lora_one.core.step.adamw`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lora_one.core.factors import Factors
from lora_one.core.ops import Array, Ops
from lora_one.core.precondition import Damping, apply_inverses, damped_inverse, grams

BETAS = (0.9, 0.999)
EPS = 1e-8


@dataclass(frozen=True)
class Rule:
    """An optimizer, and the place, strength and kind of its preconditioner."""

    optimizer: Literal["adam", "momentum"]
    place: Literal["none", "before", "mean", "after", "basis"] = "none"
    damping: Damping = "absolute"
    reg: float = 0.0

    @property
    def name(self) -> str:
        return self.place if self.place == "none" else f"{self.place}, {self.damping} {self.reg:g}"


class State(NamedTuple):
    """The steps taken and the running moments of a pair's gradients."""

    steps: int
    mean: Factors
    square: Factors


def start(ops: Ops, pair: Factors) -> State:
    """Zero moments."""
    zero = each(lambda x: ops.zeros(tuple(x.shape), like=x), pair)
    return State(0, zero, zero)


def step(ops: Ops, rule: Rule, pair: Factors, gradient: Factors, state: State, rate: float) -> tuple[Factors, State]:
    """One step. All arrays float32 or wider, with any leading batch axes: lora_A (..., r, in), lora_B (..., out, r)."""
    if rule.place == "none":
        to_moments, times_p = gradient, identity
    else:
        inverses = [damped_inverse(ops, gram, rule.reg, rule.damping) for gram in grams(ops, pair)]  # (..., r, r)
        if rule.place == "basis":
            inverses = [square_root(ops, inverse) for inverse in inverses]

        def times_p(x: Factors) -> Factors:
            return apply_inverses(ops, x, *inverses)

        to_moments = times_p(gradient) if rule.place == "before" else gradient
    to_square = times_p(gradient) if rule.place == "basis" else to_moments
    state = accumulate(rule, state, to_moments, to_square)
    direction = state.mean
    if rule.place in ("mean", "basis"):
        direction = times_p(direction)
    if rule.optimizer == "adam":
        direction = normalise(ops, direction, state)
    if rule.place in ("after", "basis"):
        direction = times_p(direction)
    return each(lambda x, d: x - rate * d, pair, direction), state


def accumulate(rule: Rule, state: State, to_mean: Factors, to_square: Factors) -> State:
    """Adam's moments; for momentum SGD torch's, m <- 0.9 m + g."""
    new = 1.0 - BETAS[0] if rule.optimizer == "adam" else 1.0
    return State(
        state.steps + 1,
        each(lambda m, g: BETAS[0] * m + new * g, state.mean, to_mean),
        each(lambda v, g: BETAS[1] * v + (1.0 - BETAS[1]) * g * g, state.square, to_square),
    )


def normalise(ops: Ops, direction: Factors, state: State) -> Factors:
    """Adam's division, with the bias corrections of both moments."""
    mean, square = (1.0 - beta**state.steps for beta in BETAS)
    return each(lambda d, v: d / mean / (ops.sqrt(v / square) + EPS), direction, state.square)


def square_root(ops: Ops, x: Array) -> Array:
    """The symmetric root of symmetric positive definite matrices (..., r, r): their SVD is their eigendecomposition."""
    u, s, _ = ops.svd(x)
    return ops.matmul(u * ops.sqrt(s)[..., None, :], ops.matrix_transpose(u))


def each(function: Callable[..., Array], *pairs: Factors) -> Factors:
    """`function` of the A's, and of the B's."""
    return Factors(*(function(*arrays) for arrays in zip(*pairs, strict=True)))


def identity(x: Factors) -> Factors:
    return x
