"""The paper's two models (arXiv 2502.01235) and its iteration: what all figures share.

    linear     f(x) = (W + B A) x                Gaussian x, y = (W + D) x with D of low rank
    ReLU       f(x) = relu((W + B A) x)          y = relu((W + D) x)

with the loss 1/(2 N) sum ||f(x) - y||^2. Written in the shift C of W, C = B A unless the base weight was changed too:
the linear loss depends on C - D alone, so there is no W in it. Leading axes, where there are any, are of several
iterations that go at once.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from lora_one.core.factors import Factors
from lora_one.core.ops import Array, Ops
from lora_one.core.step import gradient_descent

from .arrays import Arrays


class Linear:
    """Args: target: D, (out, in), float64; samples: N."""

    def __init__(self, arrays: Arrays, target: np.ndarray, samples: int, seed: int):
        x = np.random.default_rng(seed).standard_normal((samples, target.shape[1]))
        self._arrays = arrays
        self._covariance = arrays.of(x.T @ x / samples)  # (in, in)
        self.target = arrays.of(target)

    def gradient(self, shift: Array) -> Array:
        """dL/dW at W + shift, (..., out, in)."""
        return self._arrays.ops.matmul(shift - self.target, self._covariance)

    def risk(self, shift: Array) -> np.ndarray:
        """The expected loss on a new Gaussian x: 1/2 ||shift - D||_F^2."""
        return 0.5 * self._arrays.norm(shift - self.target) ** 2


class Relu:
    """A layer of ReLU units. A fixed orthogonal readout would change neither loss nor gradients, so there is none.

    Args: weight, target: W and D, (out, in), float64; samples: N, and as many others for the risk.
    """

    def __init__(self, arrays: Arrays, weight: np.ndarray, target: np.ndarray, samples: int, seed: int):
        x = np.random.default_rng(seed).standard_normal((2, samples, weight.shape[1]))
        self._arrays, self._samples = arrays, samples
        self._weight = arrays.of(weight)
        self.target = arrays.of(target)
        self._x, self._x_new = (arrays.of(part) for part in x)  # (N, in)
        self._y, self._y_new = (self._units(part, self.target)[0] for part in (self._x, self._x_new))  # (N, out)

    def gradient(self, shift: Array) -> Array:
        """dL/dW at W + shift, (..., out, in)."""
        ops = self._arrays.ops
        output, active = self._units(self._x, shift)
        error = (output - self._y) * active  # (N, out)
        return ops.matmul(ops.matrix_transpose(error), self._x) / self._samples

    def risk(self, shift: Array) -> np.ndarray:
        """The mean loss on samples that the gradient does not see."""
        output, _ = self._units(self._x_new, shift)
        return 0.5 * self._arrays.norm(output - self._y_new) ** 2 / self._samples

    def _units(self, x: Array, shift: Array) -> tuple[Array, Array]:
        """The layer's output, and which of its units are active, both (N, out)."""
        ops = self._arrays.ops
        z = ops.matmul(x, ops.matrix_transpose(self._weight + shift))
        active = ops.astype(z > 0, z.dtype)
        return z * active, active


def product(ops: Ops, pair: Factors) -> Array:
    """B A, (..., out, in)."""
    return ops.matmul(pair.lora_B, pair.lora_A)


def descend(
    ops: Ops,
    problem: Linear | Relu,
    pair: Factors,
    learning_rate: float,
    reg: float | None,
    steps: int,
    correction: Array | float = 0.0,
) -> Iterator[tuple[Factors, Array]]:
    """The pair and the shift of W before the first and after each of `steps` steps.

    Args:
        reg: of the preconditioner; None is plain gradient descent.
        correction: what was added to the base weight before, (out, in); LoRA-GA's is -B0 A0.
    """
    for step in range(steps + 1):
        shift = product(ops, pair) + correction
        yield pair, shift
        if step < steps:
            g = problem.gradient(shift)
            gradient = Factors(  # by the chain rule from dL/dW
                ops.matmul(ops.matrix_transpose(pair.lora_B), g),  # B^T G, (..., r, in)
                ops.matmul(g, ops.matrix_transpose(pair.lora_A)),  # G A^T, (..., out, r)
            )
            pair = gradient_descent(ops, pair, gradient, learning_rate, reg)


def plain_pair(arrays: Arrays, out: int, in_: int, rank: int, variance: float, seed: int) -> Factors:
    """LoRA's start: A Gaussian of the variance given, B = 0."""
    a = np.random.default_rng(seed).standard_normal((rank, in_)) * np.sqrt(variance)
    return Factors(arrays.of(a), arrays.of(np.zeros((out, rank))))


def together(ops: Ops, pairs: Iterable[Factors]) -> Factors:
    """Pairs of one shape along a new first axis: lora_A (n, r, in), lora_B (n, out, r)."""
    return Factors(*(ops.stack(side) for side in zip(*pairs, strict=True)))


def low_rank(out: int, in_: int, singular_values: np.ndarray, seed: int) -> np.ndarray:
    """A random (out, in) matrix with the singular values given."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, len(singular_values))))[0] for n in (out, in_))
    return (u * singular_values) @ v.T
