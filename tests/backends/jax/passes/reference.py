"""Starting states of a session's layers, and what a pass should make of them, in NumPy and float64."""

from collections.abc import Mapping

import numpy as np

from lora_one.backends.jax import JaxSession
from lora_one.core.fold import TEST_COLUMNS, FoldState, fold, of_mean, start_fold
from lora_one.core.omega import draw_omega
from tests.arrays import Arrays

NUMPY = Arrays("numpy", "float64")


def start_of(session: JaxSession, arrays: Arrays | None = None, oversample: int = 16) -> dict[str, FoldState]:
    """The state of each layer before the first batch, as arrays of the session, or of the given kind."""
    states = {}
    for layer in session.layers:
        width = min(layer.rank + oversample, layer.in_features, layer.out_features)
        omega = draw_omega(0, layer.name, layer.in_features, width)
        test = draw_omega(0, f"{layer.name}, test", layer.in_features, TEST_COLUMNS)
        ops, like = (session.ops, session.like(layer.name)) if arrays is None else (arrays.ops, arrays.like)
        states[layer.name] = start_fold(ops, ops.asarray(omega, like), layer.out_features, ops.asarray(test, like))
    return states


def folded(start: FoldState, gradients: list[np.ndarray]) -> FoldState:
    """The mean state after the gradients, (out, in), of all batches."""
    state = start
    for gradient in gradients:
        state = fold(NUMPY.ops, state, np.asarray(gradient, np.float64))
    return of_mean(NUMPY.ops, state, len(gradients))


def assert_folded(
    session: JaxSession, states: Mapping[str, FoldState], gradients: Mapping[str, list[np.ndarray]], atol: float = 3e-5
) -> None:
    """Check states that a fold pass returned against the true gradients of all batches, by layer."""
    start = start_of(session, NUMPY)
    assert states.keys() == gradients.keys()
    for name, state in states.items():
        expected = folded(start[name], gradients[name])
        got = FoldState(*(np.asarray(x, np.float64) for x in state))
        size = np.abs(expected.s).max()
        np.testing.assert_allclose(
            (got.u * got.s) @ got.v.T, (expected.u * expected.s) @ expected.v.T, atol=atol * size, err_msg=name
        )
        np.testing.assert_allclose(got.tested, expected.tested, atol=atol * size, err_msg=name)
        k = got.s.shape[0]
        np.testing.assert_allclose(got.u.T @ got.u, np.eye(k), atol=3 * atol, err_msg=name)
        np.testing.assert_allclose(got.v.T @ got.v, np.eye(k), atol=3 * atol, err_msg=name)
