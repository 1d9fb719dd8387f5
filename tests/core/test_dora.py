import numpy as np

from lora_one.core.dora import effective_weight, magnitudes
from lora_one.core.factors import Factors

RNG = np.random.default_rng(0)
W, A, B = RNG.standard_normal((30, 20)), RNG.standard_normal((4, 20)), RNG.standard_normal((30, 4))
ADAPTED = W + 2.5 * B @ A


def test_magnitudes_are_the_norms_of_the_rows_of_the_adapted_weight(arrays):
    pair = Factors(arrays.of(A), arrays.of(B))
    arrays.assert_close(magnitudes(arrays.ops, arrays.of(W), pair, 2.5), np.linalg.norm(ADAPTED, axis=1))


def test_with_these_magnitudes_dora_computes_with_the_adapted_weight_itself(arrays):
    w, pair = arrays.of(W), Factors(arrays.of(A), arrays.of(B))
    m = magnitudes(arrays.ops, w, pair, 2.5)
    arrays.assert_close(effective_weight(arrays.ops, w, pair, 2.5, m), ADAPTED)


def test_rows_get_the_lengths_of_the_magnitudes_also_in_stacks(arrays):
    m = RNG.standard_normal((2, 30))
    w, pair = arrays.of(np.stack([W, -W])), Factors(*(arrays.of(np.stack([x, x])) for x in (A, B)))
    got = effective_weight(arrays.ops, w, pair, 2.5, arrays.of(m))
    adapted = np.stack([ADAPTED, -W + 2.5 * B @ A])
    arrays.assert_close(got, m[..., None] * adapted / np.linalg.norm(adapted, axis=-1, keepdims=True))
