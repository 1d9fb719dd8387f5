"""SVD -> (A0, B0): the spectral initialisation, and plain LoRA's for a layer without a gradient."""

import math
from typing import NamedTuple

from .ops import Array, Ops
from .spectrum import Spectrum

SYMMETRIC = 0.5  # the balance of the paper, half to each factor
BALANCE = 0.0  # the default, all rows of A0 equally long: docs/evidence/quality.md has why it is not the paper's


class Factors(NamedTuple):
    """A LoRA pair in PEFT's orientation: the layer computes W x + scaling * lora_B lora_A x."""

    lora_A: Array  # (r, in)
    lora_B: Array  # (out, r)


class Lengths(NamedTuple):
    """How long the factors' vectors are: A0 = diag(rows) V^T, B0 = U diag(columns)."""

    rows: Array  # of A0, (r,)
    columns: Array  # of B0, (r,)


def lengths(ratios: Array, balance: float) -> Lengths:
    """Share the ratios S_i / S_1 between A0 and B0: what the rows have, the columns do not.

    rows = r^(1/2 - p) (S_i / S_1)^p, columns = r^(p - 1/2) (S_i / S_1)^(1 - p), with p the balance. At p = 1/2 both are
    sqrt(S_i / S_1), the paper's form, whose last rows and columns are near zero at high ranks. At p = 0 all rows of A0
    are equally long, sqrt(r), and B0, which plain LoRA starts at zero, takes the singular values.

    Args:
        ratios: (r,), descending, the first of them 1.
        balance: p, from 0 to 1/2.
    """
    unequal = float(ratios.shape[-1]) ** (SYMMETRIC - balance)
    return Lengths(unequal * ratios**balance, ratios ** (1.0 - balance) / unequal)


def normalized_factors(ops: Ops, spectrum: Spectrum, gamma: float, balance: float = BALANCE) -> Factors:
    """B0 A0 = U diag(S / S_1) V^T / gamma; at balance 1/2 B0 = U diag(q) / sqrt(gamma), A0 = diag(q) V^T / sqrt(gamma).

    Here q_i = sqrt(S_i / S_1). So scaling * B0 A0 is one step of spectral norm scaling / gamma along the best rank-r
    part of -G. It does not depend on the scale of the gradient. (LoRA-One, arXiv 2502.01235: the initialisation of its
    Algorithm 1, in the form that the paper's LLM experiments run, at balance 1/2.)

    Args:
        spectrum: the spectrum of -G, with S_1 > 0.
        gamma: > 0; the larger, the smaller the step.
        balance: of `lengths`.
    """
    # The authors' README prints Diag(S) here; their code takes sqrt(S / S_1), as below. Their names are also swapped
    # against PEFT's: their A is the out side, lora_B.
    return _of_lengths(spectrum, lengths(spectrum.s / spectrum.s[..., :1], balance), 1.0 / math.sqrt(gamma))


def gradient_factors(ops: Ops, spectrum: Spectrum, eta: float, balance: float = BALANCE) -> Factors:
    """B0 A0 = -eta * (best rank-r part of G): one step of gradient descent at learning rate eta.

    At balance 1/2 B0 = sqrt(eta) U diag(sqrt(S)) and A0 = sqrt(eta) diag(sqrt(S)) V^T, the form of the paper's theory.
    """
    largest = spectrum.s[..., :1]
    return _of_lengths(spectrum, lengths(spectrum.s / largest, balance), ops.sqrt(largest) * math.sqrt(eta))


def plain_factors(ops: Ops, omega: Array, rank: int, out_features: int) -> Factors:
    """A Gaussian, B = 0: the usual start of LoRA, for a layer whose gradient is zero.

    Args:
        omega: the layer's test matrix, (in, k), k >= rank. Its first columns become A, scaled to variance 1 / (3 in):
            that of PEFT's Kaiming-uniform start.
    """
    in_features = omega.shape[0]
    lora_A = ops.matrix_transpose(omega[:, :rank]) / math.sqrt(3.0 * in_features)  # (r, in)
    return Factors(lora_A, ops.zeros((out_features, rank), like=omega))


def _of_lengths(spectrum: Spectrum, of_vectors: Lengths, size: Array | float) -> Factors:
    """Return the factors whose vectors have these lengths, times `size`."""
    rows, columns = (length * size for length in of_vectors)
    return Factors(rows[..., None] * spectrum.vt, spectrum.u * columns[..., None, :])
