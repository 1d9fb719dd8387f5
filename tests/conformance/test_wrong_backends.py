"""The suite itself is tested: every deliberate mistake must fail in the row that has its name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lora_one.backends.numpy.ops import NumpyOps
from lora_one.conformance import Check, Target, checks, run
from lora_one.conformance.computations import problems
from lora_one.core import alignment, bases, deferred, estimates, exact, factors, fold, omega, precondition, sides, step
from lora_one.core.factors import Factors
from lora_one.core.gradient import RowProduct


def target(ops: Any = None, **fields: Any) -> Target:
    return Target("wrong", "float32", ops or NumpyOps(), np.zeros((), np.float32), **fields)


def fails(check: Check, on: Target) -> bool:
    result = run(check, on)
    return not result.passed and result.check == check.name


def coarse(x: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa: what TF32 keeps."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2.0**11) / 2.0**11, exponent).astype(x.dtype)


# --- primitives -------------------------------------------------------------------------------------------------------

RIGHT = NumpyOps()


def _garbage_where_not_definite(gram, rhs):
    return np.linalg.solve(gram, np.broadcast_to(rhs, (*gram.shape[:-2], *rhs.shape[-2:])))


def _first_of_batch(gram, rhs):
    return RIGHT.cholesky_solve(gram[:1] if gram.ndim > 2 else gram, rhs)


def _first_right_side(gram, rhs):
    return RIGHT.cholesky_solve(gram, rhs[:1] if rhs.ndim > 2 else rhs)


def _descending_rows(x):
    u, s, vt = RIGHT.svd(x)
    return u[..., ::-1], s[..., ::-1], vt[..., ::-1, :]


def _nearly_orthogonal(x):
    q, r = RIGHT.qr(x)
    return q * np.float32(1 + 1e-5), r / np.float32(1 + 1e-5)


def _gram_schmidt_that_normalises_zero(x):
    q, r = RIGHT.qr(x)
    return np.where(np.abs(np.diagonal(r))[None, :] > 1e-6, q, 0.0).astype(x.dtype), r


WRONG_PRIMITIVES: list[tuple[str, str, Callable[..., Any]]] = [
    ("asarray, to_numpy", "asarray", lambda x, like: np.asarray(x, like.dtype).T),
    ("asarray, to_numpy", "asarray", lambda x, like: np.asarray(x, np.float16).astype(like.dtype)),
    ("asarray, to_numpy", "asarray", lambda x, like: np.asarray(x, like.dtype).reshape(np.atleast_1d(x).shape)),
    ("asarray, to_numpy", "to_numpy", lambda x: np.array(x).ravel(order="F").reshape(x.shape)),
    ("astype, at_least_float32", "astype", lambda x, dtype: x.astype(np.float16).astype(dtype)),
    ("astype, at_least_float32", "at_least_float32", lambda x: -x),
    ("matmul", "matmul", lambda a, b: coarse(a) @ coarse(b)),
    ("matmul", "matmul", lambda a, b: -(a @ b)),
    ("matmul", "matmul", lambda a, b: (a @ b) if a.ndim == 2 else (a[:1] @ b).repeat(len(a), 0)),
    ("matrix_transpose", "matrix_transpose", lambda x: np.transpose(x)),
    ("matrix_transpose", "matrix_transpose", lambda x: x),
    ("qr", "qr", lambda x: tuple(a.swapaxes(-1, -2) for a in RIGHT.qr(x))),
    ("qr", "qr", lambda x: (RIGHT.qr(x)[0], -RIGHT.qr(x)[1])),
    ("qr", "qr", _nearly_orthogonal),
    ("qr", "qr", lambda x: np.linalg.qr(x, mode="complete")),
    ("qr", "qr", _gram_schmidt_that_normalises_zero),
    ("svd", "svd", lambda x: (RIGHT.svd(x)[0], RIGHT.svd(x)[1], RIGHT.svd(x)[2].swapaxes(-1, -2))),
    ("svd", "svd", _descending_rows),
    ("svd", "svd", lambda x: np.linalg.svd(x, full_matrices=True)),
    ("svd", "svd", lambda x: RIGHT.svd(coarse(x))),
    ("svdvals", "svdvals", lambda x: RIGHT.svdvals(x)[..., ::-1]),
    ("svdvals", "svdvals", lambda x: RIGHT.svdvals(x) ** 2),
    ("svdvals", "svdvals", lambda x: RIGHT.svdvals(coarse(x))),
    ("cholesky_solve", "cholesky_solve", lambda gram, rhs: RIGHT.cholesky_solve(gram, rhs) * 1.001),
    ("cholesky_solve", "cholesky_solve", lambda gram, rhs: np.linalg.solve(np.linalg.cholesky(gram), rhs)),
    ("cholesky_solve", "cholesky_solve", _first_of_batch),
    ("cholesky_solve", "cholesky_solve", _first_right_side),
    ("cholesky_solve, not definite", "cholesky_solve", _garbage_where_not_definite),
    ("cholesky_solve, not definite", "cholesky_solve", lambda gram, rhs: np.full_like(rhs, np.nan)),
    ("eye", "eye", lambda n, like: np.ones((n, n), like.dtype)),
    ("zeros", "zeros", lambda shape, like: np.zeros(shape or (1,), like.dtype)),
    ("zeros", "zeros", lambda shape, like: np.full(shape, 1e-30, like.dtype)),
    ("eps", "eps", lambda x: float(np.finfo(np.float64).eps)),
    ("sqrt", "sqrt", lambda x: np.sqrt(coarse(x))),
    ("sum", "sum", lambda x, axis=None: np.mean(x, axis=axis)),
    ("sum", "sum", lambda x, axis=None: np.sum(x, axis=axis, keepdims=True)),
    ("sum", "sum", lambda x, axis=None: np.sum(x, axis=axis if axis != -1 else 0)),
    ("max", "max", lambda x, axis=None: np.max(np.abs(x), axis=axis)),
    ("max", "max", lambda x, axis=None: np.max(x, axis=axis, initial=0.0)),
    ("isfinite, comparisons", "isfinite", lambda x: ~np.isnan(x)),
    ("isfinite, comparisons", "isfinite", lambda x: ~np.isinf(x)),
    ("concat", "concat", lambda xs, axis=0: np.concatenate(xs[::-1], axis=axis)),
    ("concat", "concat", lambda xs, axis=0: np.concatenate(xs)),
    ("stack", "stack", lambda xs, axis=0: np.stack(xs)),
    ("where", "where", lambda condition, x, y: np.where(condition, y, x)),
    ("where", "where", lambda condition, x, y: condition * x + ~condition * y),
]


@pytest.mark.parametrize(("name", "method", "wrong"), WRONG_PRIMITIVES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_primitive_fails_in_its_row(name, method, wrong):
    ops = NumpyOps()
    setattr(ops, method, wrong)
    assert fails(Check(name, "eager"), target(ops))
    assert run(Check(name, "eager"), target()).passed


def test_a_backend_that_raises_fails_with_the_message():
    ops = NumpyOps()
    ops.qr = lambda x: (_ for _ in ()).throw(NotImplementedError("no reduced mode"))
    result = run(Check("qr", "eager"), target(ops))
    assert not result.passed and result.failure == "NotImplementedError: no reduced mode"


def test_narrow_inputs_that_are_computed_with_as_they_are_fail():
    torch = pytest.importorskip("torch")
    from lora_one.backends.torch import TorchOps

    ops = TorchOps()
    ops.at_least_float32 = lambda x: x
    narrow = Target("wrong", "bfloat16", ops, torch.zeros((), dtype=torch.bfloat16))
    for name in ("astype, at_least_float32", "precondition", "gradient descent"):
        assert fails(Check(name, "eager"), narrow)
        assert run(Check(name, "eager"), Target("right", "bfloat16", TorchOps(), narrow.like)).passed


# --- steps ------------------------------------------------------------------------------------------------------------

TRUE = {
    name: getattr(module, name)
    for module, names in {
        omega: ("draw_omega",),
        exact: ("exact_spectrum",),
        fold: ("start_fold", "fold", "aim", "read_both_sides", "merge_folds", "finish_fold"),
        sides: ("sides_as_factors", "products_of"),
        factors: ("normalized_factors", "gradient_factors", "plain_factors"),
        deferred: ("start_step", "add_both_sides", "settled", "_cosine"),
        precondition: ("precondition", "damped_inverse"),
        step: ("gradient_descent", "adamw", "_adamw"),
        alignment: ("principal_cosines", "principal_sines", "captured_energy"),
    }.items()
    for name in names
}


def _swapped(pair: Factors) -> Factors:
    return Factors(pair.lora_B.T, pair.lora_A.T)


def _power_scaled(ops, spectrum, gamma, balance):
    """q = S / S_1, as the authors' README prints it."""
    return TRUE["normalized_factors"](ops, spectrum._replace(s=spectrum.s**2), gamma, balance)


def _always_symmetric(ops, spectrum, size, balance):
    return TRUE["normalized_factors"](ops, spectrum, size)


def _started_symmetric(ops, pair, gradient, state, gamma, balance):
    return TRUE["start_step"](ops, pair, gradient, state, gamma)


def _without_reorthogonalization(ops, remainder, basis, k):
    return ops.qr(remainder[:, :k])[0]


def _negated(gradient):
    return RowProduct(-gradient.dy, gradient.x) if isinstance(gradient, RowProduct) else -gradient


def _merged_but_for_the_test(ops, state, other):
    return TRUE["merge_folds"](ops, state, other)._replace(tested=state.tested)


def _one_side_read(ops, state, products):
    return TRUE["read_both_sides"](ops, state, products._replace(g_left=0 * products.g_left))


def _read_but_for_the_turn(ops, state, products):
    return TRUE["read_both_sides"](ops, state, products)._replace(turn=state.turn)


def _sides_in_one_half(ops, pair):
    """A = [V^T; V^T]: the product is U V^T, and no longer zero."""
    lora_A, lora_B = TRUE["sides_as_factors"](ops, pair)
    return Factors(np.where(lora_A == 0, np.resize(pair.right.T, lora_A.shape), lora_A), lora_B)


def _products_negated_on_the_left(ops, gradients, p):
    products = TRUE["products_of"](ops, gradients, p)
    return products._replace(g_left=-products.g_left)


def _started_again(ops, pair, gradient, state, gamma, balance):
    """Each gradient makes a start of its own: what the steps before have read is forgotten."""
    new, after = TRUE["start_step"](ops, pair, gradient, state, gamma, balance)
    return new, after._replace(s=after.s * np.float32(1e-3))


def _not_of_descent(ops, pair, gradient, state, gamma, balance):
    return TRUE["start_step"](ops, pair, Factors(*(-g for g in gradient)), state, gamma, balance)


def _negated_on_one_side(ops, pair, gradient, state, gamma, balance):
    return TRUE["start_step"](ops, pair, gradient._replace(lora_A=-gradient.lora_A), state, gamma, balance)


def _nothing_known(ops, known, products):
    return TRUE["add_both_sides"](ops, known._replace(s=0 * known.s), products)


def _one_side_added(ops, known, products):
    return TRUE["add_both_sides"](ops, known, products._replace(g_left=0 * products.g_left))


def _sequential_descent(ops, pair, gradient, rate, reg, damping):
    """B's step from the new A."""
    first = TRUE["gradient_descent"](ops, pair, gradient, rate, reg, damping)
    second = TRUE["gradient_descent"](ops, Factors(first.lora_A, pair.lora_B), gradient, rate, reg, damping)
    return Factors(first.lora_A, second.lora_B)


def _sequential_adamw(ops, pair, gradient, state, rate, **settings):
    first, state_a = TRUE["adamw"](ops, pair, gradient, state, rate, **settings)
    second, state_b = TRUE["adamw"](ops, Factors(first.lora_A, pair.lora_B), gradient, state, rate, **settings)
    return Factors(first.lora_A, second.lora_B), step.PairState(state_a.lora_A, state_b.lora_B)


def _no_bias_correction(ops, parameter, gradient, moments, rate, betas, eps, decay):
    late = moments._replace(steps=10**6)
    new, after = TRUE["_adamw"](ops, parameter, gradient, late, rate, betas, eps, decay)
    return new, after._replace(steps=moments.steps + 1)


def _coupled_decay(ops, parameter, gradient, moments, rate, betas, eps, decay):
    return TRUE["_adamw"](ops, parameter, gradient + decay * parameter, moments, rate, betas, eps, 0.0)


def _other_side(ops, pair, gradient, reg, damping):
    """Each gradient with its own factor's Gram."""
    grams = precondition.grams(ops, pair)
    inverses = [TRUE["damped_inverse"](ops, gram, reg, damping) for gram in grams]
    return precondition.apply_inverses(ops, gradient, inverses[1], inverses[0])


NO_REG = lambda ops, pair, gradient, reg, damping: TRUE["precondition"](ops, pair, gradient, 0.0, damping)  # noqa: E731
ONE_DAMPING = lambda ops, gram, reg, damping: TRUE["damped_inverse"](ops, gram, reg, "absolute")  # noqa: E731

WRONG_STEPS: list[tuple[str, Any, str, Callable[..., Any]]] = [
    ("omega", omega, "draw_omega", lambda seed, *a: TRUE["draw_omega"](seed + 1, *a)),
    ("omega", omega, "draw_omega", lambda seed, layer, *a: TRUE["draw_omega"](seed, layer.split(".")[-1], *a)),
    ("exact spectrum", exact, "exact_spectrum", lambda ops, g, r: TRUE["exact_spectrum"](ops, -g, r)),
    ("exact spectrum", exact, "exact_spectrum", lambda ops, g, r: TRUE["exact_spectrum"](ops, g, max(r - 1, 1))),
    ("exact spectrum", exact, "exact_spectrum", lambda ops, g, r: TRUE["exact_spectrum"](ops, coarse(g), r)),
    ("fold, after each batch", bases, "new_directions", _without_reorthogonalization),
    ("fold, after each batch", fold, "start_fold", lambda ops, o, n, t: TRUE["start_fold"](ops, o[::-1], n, t)),
    ("fold, after each batch", fold, "fold", lambda ops, s, g: TRUE["fold"](ops, s, _negated(g))),
    ("fold, after each batch", fold, "fold", lambda ops, s, g: TRUE["fold"](ops, s._replace(s=0 * s.s), g)),
    ("fold, after each batch", fold, "PRODUCTS", 2),
    ("fold, after each batch", fold, "finish_fold", lambda ops, s, r: TRUE["finish_fold"](ops, s, min(r + 1, 5))),
    ("fold, after each batch", fold, "TURN_OF_A_FOLD", 0.25),
    ("fold, after each batch", estimates, "MIN_RELATIVE_GAP", 1.0),
    ("fold, after each batch", fold, "aim", lambda ops, s, p: s._replace(u=p.g_right[:, : s.s.size])),
    ("fold, after each batch", fold, "aim", lambda ops, s, p: TRUE["aim"](ops, s, p)._replace(v=s.v)),
    ("fold, after each batch", fold, "aim", lambda ops, s, p: TRUE["aim"](ops, s, p)._replace(tested=s.tested)),
    ("fold, after each batch", fold, "read_both_sides", lambda ops, s, products: s),
    ("fold, after each batch", fold, "read_both_sides", _one_side_read),
    ("fold, after each batch", fold, "read_both_sides", _read_but_for_the_turn),
    ("fold, after each batch", fold, "outside", lambda ops, x, basis: 0 * x[0]),
    ("fold, after each batch", sides, "sides_as_factors", _sides_in_one_half),
    ("fold, after each batch", sides, "products_of", lambda ops, g, p: TRUE["products_of"](ops, g, p - 1)),
    ("fold, after each batch", sides, "products_of", _products_negated_on_the_left),
    ("fold, after each batch", fold, "merge_folds", lambda ops, s, other: s),
    ("fold, after each batch", fold, "merge_folds", _merged_but_for_the_test),
    ("factors, normalized", factors, "normalized_factors", _power_scaled),
    (
        "factors, normalized",
        factors,
        "normalized_factors",
        lambda o, s, g, b: TRUE["normalized_factors"](o, s, g**0.5, b),
    ),
    ("factors, normalized", factors, "normalized_factors", lambda o, s, g, b: TRUE["gradient_factors"](o, s, 1 / g, b)),
    ("factors, normalized", factors, "normalized_factors", _always_symmetric),
    ("factors, gradient", factors, "gradient_factors", lambda o, s, e, b: TRUE["gradient_factors"](o, s, e**2, b)),
    ("factors, gradient", factors, "gradient_factors", lambda *a: _swapped(TRUE["gradient_factors"](*a))),
    ("factors, plain", factors, "plain_factors", lambda o, w, r, n: TRUE["plain_factors"](o, w * 3**0.5, r, n)),
    ("start without data", deferred, "start_step", _started_again),
    ("start without data", deferred, "start_step", _not_of_descent),
    ("start without data", deferred, "start_step", lambda o, p, g, s, x, b: TRUE["start_step"](o, p, g, s, x / 2, b)),
    ("start without data", deferred, "start_step", _started_symmetric),
    ("start without data", deferred, "start_step", _negated_on_one_side),
    ("start without data", deferred, "add_both_sides", _one_side_added),
    ("start without data", deferred, "add_both_sides", _nothing_known),
    ("start without data", deferred, "readable", lambda ops, g: np.ones(g.lora_A.shape[:-2], bool)),
    ("start without data", deferred, "_cosine", lambda ops, within, s: 0.99 * TRUE["_cosine"](ops, within, s)),
    ("start without data", deferred, "settled", lambda ops, steps, states: TRUE["settled"](ops, 0 * steps, states)),
    ("start without data", deferred, "NOISE", 1e-3),
    ("precondition", precondition, "precondition", NO_REG),
    ("precondition", precondition, "precondition", _other_side),
    ("precondition", precondition, "precondition", lambda ops, p, g, *a: g),
    ("precondition", precondition, "damped_inverse", ONE_DAMPING),
    ("gradient descent", step, "gradient_descent", _sequential_descent),
    ("gradient descent", step, "gradient_descent", lambda o, p, g, lr, *a: TRUE["gradient_descent"](o, p, g, -lr, *a)),
    ("gradient descent", step, "precondition", NO_REG),
    ("AdamW", step, "adamw", _sequential_adamw),
    ("AdamW", step, "_adamw", _no_bias_correction),
    ("AdamW", step, "_adamw", _coupled_decay),
    ("AdamW", step, "precondition", NO_REG),
    ("alignment", alignment, "principal_cosines", lambda *a: TRUE["principal_cosines"](*a) ** 2),
    ("alignment", alignment, "principal_sines", lambda *a: np.sqrt(1 - TRUE["principal_cosines"](*a)[::-1] ** 2)),
    ("alignment", alignment, "captured_energy", lambda *a: np.sqrt(TRUE["captured_energy"](*a))),
]


@pytest.mark.parametrize(
    ("name", "module", "function", "wrong"), WRONG_STEPS, ids=lambda x: x if type(x) is str else ""
)
def test_a_wrong_step_fails_in_its_row(name, module, function, wrong, monkeypatch):
    assert run(Check(name, "eager"), target()).passed
    monkeypatch.setattr(module, function, wrong)
    assert fails(Check(name, "eager"), target())


# --- compilers and optimizers -----------------------------------------------------------------------------------------

COMPILED = [check for check in checks() if check.mode == "compiled"]
OPTIMIZERS = [check for check in checks() if check.mode == "optimizer"]


@pytest.mark.parametrize("check", COMPILED, ids=lambda check: check.name)
def test_a_compiler_that_loses_digits_fails_in_its_row(check):
    assert fails(check, target(compile=lambda function: lambda arrays: function([coarse(x) for x in arrays])))
    assert run(check, target(compile=lambda function: function)).passed


def train(inputs, params, rate=1.0, steps=0, **settings):
    """The spec itself as a backend's optimizer, with some settings changed."""
    trained = []
    chosen = {**{name: params[name] for name in ("weight_decay", "reg", "damping")}, **settings}
    for problem in inputs:
        pair, state = problem.pair, step.start_pair(RIGHT, problem.pair)
        for _ in range(params["steps"] + steps):
            gradient = problem.gradient(RIGHT, pair, params["loss"])
            pair, state = step.adamw(RIGHT, pair, gradient, state, params["rate"] * rate, **chosen)
        trained.extend(pair)
    return trained


@pytest.mark.parametrize("check", OPTIMIZERS, ids=lambda check: check.name)
@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 1.001},
        {"steps": 1},
        {"reg": None},
        {"reg": 1e-2, "damping": "absolute"},
        {"weight_decay": 0.0},
        {"betas": (0.9, 0.99)},
        {"eps": 1e-4},
    ],
    ids=str,
)
def test_a_wrong_optimizer_fails_in_its_row(check, changes):
    assert fails(check, target(train=lambda inputs, params: train(inputs, params, **changes)))
    assert run(check, target(train=train)).passed


def test_every_row_has_something_wrong_that_fails_it():
    covered = {name for name, *_ in WRONG_PRIMITIVES} | {name for name, *_ in WRONG_STEPS}
    assert covered == {check.computation for check in checks() if check.mode == "eager"}
    assert {check.mode for check in checks()} == {"eager", "compiled", "optimizer"}
    assert problems([]) == []
