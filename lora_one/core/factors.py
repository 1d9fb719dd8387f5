"""SVD -> (A0, B0): the spectral initialisation, and plain LoRA's for a layer without a gradient."""

import math
from typing import NamedTuple

from .ops import Array, Ops
from .spectrum import Spectrum


class Factors(NamedTuple):
    """A LoRA pair in PEFT's orientation: the layer computes W x + scaling * lora_B lora_A x."""

    lora_A: Array  # (r, in)
    lora_B: Array  # (out, r)


def normalized_factors(ops: Ops, spectrum: Spectrum, gamma: float) -> Factors:
    """B0 = U diag(q) / sqrt(gamma), A0 = diag(q) V^T / sqrt(gamma), with q_i = sqrt(S_i / S_1).

    So scaling * B0 A0 is one step of spectral norm scaling / gamma along the best rank-r part of -G. It does not depend
    on the scale of the gradient. (LoRA-One, arXiv 2502.01235: the initialisation of its Algorithm 1, in the form that
    the paper's LLM experiments run.)

    Args:
        spectrum: the spectrum of -G, with S_1 > 0.
        gamma: > 0; the larger, the smaller the step.
    """
    # The authors' README prints Diag(S) here; their code takes sqrt(S / S_1), as below. Their names are also swapped
    # against PEFT's: their A is the out side, lora_B.
    q = ops.sqrt(spectrum.s / spectrum.s[..., :1])  # (r,)
    return _balanced(spectrum, q / math.sqrt(gamma))


def gradient_factors(ops: Ops, spectrum: Spectrum, eta: float) -> Factors:
    """B0 = sqrt(eta) U diag(sqrt(S)), A0 = sqrt(eta) diag(sqrt(S)) V^T: the form of the paper's theory.

    Then B0 A0 = -eta * (best rank-r part of G): one step of gradient descent at learning rate eta.
    """
    return _balanced(spectrum, ops.sqrt(spectrum.s) * math.sqrt(eta))


def plain_factors(ops: Ops, omega: Array, rank: int, out_features: int) -> Factors:
    """A Gaussian, B = 0: the usual start of LoRA, for a layer whose gradient is zero.

    Args:
        omega: the layer's test matrix, (in, k), k >= rank. Its first columns become A, scaled to variance 1 / (3 in):
            that of PEFT's Kaiming-uniform start.
    """
    in_features = omega.shape[0]
    lora_A = ops.matrix_transpose(omega[:, :rank]) / math.sqrt(3.0 * in_features)  # (r, in)
    return Factors(lora_A, ops.zeros((out_features, rank), like=omega))


def _balanced(spectrum: Spectrum, weight: Array) -> Factors:
    return Factors(weight[..., None] * spectrum.vt, spectrum.u * weight[..., None, :])
