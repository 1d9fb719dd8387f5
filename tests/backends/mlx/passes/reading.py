"""Passes that read rows, in sessions of their own, and what NumPy makes of the same gradients in float64."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import lora_one
from lora_one.backends import load_backend
from lora_one.backends.interface import Layer, PassResult
from lora_one.backends.mlx import MlxSession
from lora_one.core.fold import TEST_COLUMNS, FoldState, fold, of_mean, start_fold
from lora_one.core.omega import draw_omega
from lora_one.core.ops import Ops
from lora_one.core.sides import Products, Sides

NUMPY = load_backend("numpy").ops
CONFIG = lora_one.Config(rank=4)
WIDTH = 4  # with fewer tokens than directions, rounding decides where the others point


def started(ops: Ops, layer: Layer, like: Any) -> FoldState:
    """The state of a layer before the first batch."""
    width = min(WIDTH, layer.out_features, layer.in_features)
    omega, test = (
        ops.asarray(draw_omega(0, f"{layer.name}, {name}", layer.in_features, columns), like=like)
        for name, columns in (("omega", width), ("test", TEST_COLUMNS))
    )
    return start_fold(ops, omega, layer.out_features, test)


def fold_pass(
    model: nn.Module, batches: list[Any], loss_fn: Any = None
) -> tuple[PassResult, list[Layer], dict[str, FoldState | None]]:
    """The result, the layers, and per layer its state in float64; None where there is none."""
    with MlxSession(model, batches, loss_fn, CONFIG) as session:
        assert session.folds
        result, states = session.fold_pass(
            {layer.name: started(session.ops, layer, session.like(layer.name)) for layer in session.layers}
        )
        assert list(states) == [layer.name for layer in session.layers]
        return result, session.layers, {name: state and FoldState(*_numpy(state)) for name, state in states.items()}


def sides_pass(model: nn.Module, batches: list[Any]) -> tuple[PassResult, list[Layer], dict[str, Products | None]]:
    """The result, the layers, and for all but the first of them its products in float64."""
    with MlxSession(model, batches, None, CONFIG) as session:
        sides = {x.name: Sides(*(mx.array(side.astype(np.float32)) for side in draw_sides(x))) for x in session.layers}
        del sides[session.layers[0].name]
        result, products = session.sides_pass(sides)
        return result, session.layers, {name: of and Products(*_numpy(of)) for name, of in products.items()}


def draw_sides(layer: Layer) -> Sides:
    """Five directions on the right of a layer's gradient, and three on the left."""
    right, left = (layer.in_features, 5), (layer.out_features, 3)
    return Sides(*(draw_omega(0, f"{layer.name}, {shape}", *shape) for shape in (right, left)))


def expected_state(layer: Layer, gradients: list[np.ndarray]) -> FoldState:
    """The fold of these gradients, one per batch."""
    state = started(NUMPY, layer, np.zeros(()))
    for gradient in gradients:
        state = fold(NUMPY, state, gradient)
    return of_mean(NUMPY, state, len(gradients))


def of_layer(gradients: dict[str, np.ndarray], layer: Layer) -> np.ndarray:
    """The layer's gradient among those of `mean_gradients`."""
    path, _, index = layer.name.partition("[")
    return gradients[path][int(index[:-1])] if index else gradients[path]


def assert_same(state: FoldState, expected: FoldState, tolerance: float = 1e-4) -> None:
    """Compare what both know of G. Vectors of singular values that lie close together may mix."""
    norm = np.linalg.norm(expected.s)
    assert np.linalg.norm(state.s - expected.s) < tolerance * norm
    assert np.linalg.norm(state.u * state.s @ state.v.T - expected.u * expected.s @ expected.v.T) < tolerance * norm
    assert np.linalg.norm(state.tested - expected.tested) < tolerance * np.linalg.norm(expected.tested)
    for basis in (state.u, state.v):
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)


def _numpy(arrays: tuple[mx.array, ...]) -> list[np.ndarray]:
    return [np.array(x).astype(np.float64) for x in arrays]
