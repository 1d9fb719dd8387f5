"""Both sides of a gradient from LoRA's own gradients, against y = W x + B A x and its gradients by formula."""

import numpy as np

from lora_one.core.factors import Factors
from lora_one.core.sides import Products, Sides, products_of, sides_as_factors
from lora_one.core.stacking import stack_of, unstacked

P, Q, OUT, IN, TOKENS = 5, 3, 9, 7, 11


def problem(seed: int = 0) -> tuple[Sides, np.ndarray, np.ndarray, np.ndarray]:
    """Sides, rows x and y* of a layer, and its weight W."""
    rng = np.random.default_rng(seed)
    sides = Sides(rng.standard_normal((IN, P)), rng.standard_normal((OUT, Q)))
    return sides, *(rng.standard_normal(shape) for shape in ((TOKENS, IN), (TOKENS, OUT), (OUT, IN)))


def test_the_pair_changes_no_output(arrays):
    sides, x, _, w = problem()
    lora_A, lora_B = (arrays.numpy(f) for f in sides_as_factors(arrays.ops, Sides(*map(arrays.of, sides))))
    assert lora_A.shape == (P + Q, IN) and lora_B.shape == (OUT, P + Q)
    assert not (lora_B @ lora_A).any()
    np.testing.assert_array_equal(x @ w.T + (x @ lora_A.T) @ lora_B.T, x @ w.T)


def test_its_gradients_are_the_products_on_both_sides(arrays):
    """L = 1/2 |y - y*|^2, y = x W^T + x A^T B^T: dL/dB = dy^T (x A^T) and dL/dA = (dy B)^T x, with G = dy^T x."""
    sides, x, target, w = problem()
    lora_A, lora_B = (arrays.numpy(f) for f in sides_as_factors(arrays.ops, Sides(*map(arrays.of, sides))))
    dy = x @ w.T + (x @ lora_A.T) @ lora_B.T - target
    gradients = Factors(arrays.of((dy @ lora_B).T @ x), arrays.of(dy.T @ (x @ lora_A.T)))
    g_right, g_left = products_of(arrays.ops, gradients, P)
    g = dy.T @ x
    arrays.assert_close(g_right, g @ sides.right)
    arrays.assert_close(g_left, g.T @ sides.left)


def test_a_stack_of_layers_is_each_of_them(arrays):
    layers = [Sides(*map(arrays.of, problem(seed)[0])) for seed in range(3)]
    alone = [sides_as_factors(arrays.ops, sides) for sides in layers]
    together = sides_as_factors(arrays.ops, stack_of(arrays.ops, layers))
    for got, expected in zip(unstacked(together, 3), alone, strict=True):
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_array_equal(arrays.numpy(x), arrays.numpy(y))
    products = products_of(arrays.ops, together, P)
    for got, one in zip(unstacked(products, 3), alone, strict=True):
        expected = Products(arrays.numpy(one.lora_B)[:, :P], arrays.numpy(one.lora_A).T[:, P:])
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_array_equal(arrays.numpy(x), y)
