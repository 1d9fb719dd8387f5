"""What the suite computes: every primitive of `Ops` and every step of the spec, and what of each result is defined.

A computation has two halves. `run` is pure array code, executed by the backend under test, eagerly or compiled. `view`
is executed on the host in float64 and turns what came back into what the mathematics defines: products, projectors and
singular values, where the columns themselves may rotate.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_one.core import alignment, exact, factors, omega, precondition, sketch, step
from lora_one.core.factors import Factors
from lora_one.core.ops import Array, Ops
from lora_one.core.spectrum import Spectrum

Params = Mapping[str, Any]
Host = Sequence[np.ndarray]  # float64
View = dict[str, np.ndarray]


class Computation(NamedTuple):
    """A row of the suite.

    Attributes:
        run: (ops, inputs, params) -> arrays, on the backend.
        view: (those arrays in float64, inputs, params) -> what is compared, by name.
        exact: whether no rounding is allowed at all.
        compiled: whether it is also run compiled.
        optimizer: whether a backend's own optimizer must give the same.
        cast: whether results come back in the dtype of the inputs, also where that is narrow.
    """

    run: Callable[[Ops, Sequence[Array], Params], Sequence[Array]]
    view: Callable[[Host, Host, Params], View]
    exact: bool = False
    compiled: bool = False
    optimizer: bool = False
    cast: bool = False


def _as_they_are(arrays: Host, inputs: Host, params: Params) -> View:
    return {str(index): array for index, array in enumerate(arrays)}


# --- primitives -------------------------------------------------------------------------------------------------------


def _qr(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    return ops.qr(inputs[0])


def _qr_view(arrays: Host, inputs: Host, params: Params) -> View:
    q, r = arrays
    view = {"Q R": q @ r, "Q^T Q": q.swapaxes(-1, -2) @ q, "below R": np.tril(r, -1)}
    return {**view, "Q Q^T": q @ q.swapaxes(-1, -2)} if params["full_rank"] else view


def _svd(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    return ops.svd(inputs[0])


def _svd_view(arrays: Host, inputs: Host, params: Params) -> View:
    u, s, vt = arrays
    return {
        "U S V^T": (u * s[..., None, :]) @ vt,
        "S": s,
        "U^T U": u.swapaxes(-1, -2) @ u,
        "V^T V": vt @ vt.swapaxes(-1, -2),
    }


def _cholesky_solve(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    return [ops.cholesky_solve(*inputs)]


def _indefinite_view(arrays: Host, inputs: Host, params: Params) -> View:
    """Which matrices of the batch came back as NaN, each as a whole."""
    nan = np.isnan(arrays[0])
    return {"NaN": nan.astype(np.float64), "the others": np.where(nan, 0.0, arrays[0])}


def _reductions(name: str) -> Callable[[Ops, Sequence[Array], Params], Sequence[Array]]:
    def run(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
        reduce, x = getattr(ops, name), inputs[0]
        return [reduce(x), reduce(x, axis=0), reduce(x, axis=-1), reduce(x, axis=1, keepdims=True)]

    return run


def _narrowed(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    """What is computed wide has float32's digits, and the way back is the identity."""
    x = inputs[0]
    wide = ops.at_least_float32(x)
    return [wide / 3.0, ops.astype(wide, x.dtype)]


def _comparison(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    x = inputs[0]
    return [ops.astype(ops.isfinite(x), x.dtype), ops.astype(x == 0, x.dtype), ops.astype(x >= -x, x.dtype)]


# --- steps ------------------------------------------------------------------------------------------------------------


def _omega(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    rows, columns = params["shape"]
    return [ops.asarray(omega.draw_omega(params["seed"], params["layer"], rows, columns), like=inputs[0])]


def _exact(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    return exact.exact_spectrum(ops, inputs[0], params["rank"])


def _sketch(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    """The spectrum after each number of passes from 2 on; the gradients of a probe are products with G."""
    gradient, omega = inputs
    state = sketch.start(ops, omega, gradient.shape[0])
    found: list[Array] = []
    for passes in range(1, params["passes"] + 1):
        state = sketch.advance_on(ops, state, gradient)
        if passes >= 2:
            found.extend(sketch.finish(ops, state, params["rank"]))
    return found


def _sketch_view(arrays: Host, inputs: Host, params: Params) -> View:
    view: View = {}
    size = len(Spectrum._fields)
    for index in range(len(arrays) // size):
        one = _spectrum_view(arrays[index * size : (index + 1) * size], inputs, params)
        view.update({f"{index + 2} passes: {name}": value for name, value in one.items()})
    return view


def _spectrum_view(arrays: Host, inputs: Host, params: Params) -> View:
    """What is defined of a spectrum, in units of the largest entry of G, so that no square over- or underflows."""
    found = Spectrum(*arrays)
    unit = float(np.max(np.abs(inputs[0]))) or 1.0
    s, norm = found.s / unit, float(found.norm) / unit
    view = {
        "S": s,
        "norm": np.array(norm),
        "best norm": np.array(float(found.best_norm) / unit),
        # A square root at zero magnifies rounding, its square does not.
        "norm^2 + unseen^2": np.array(norm**2 + (float(found.unseen) / unit) ** 2),
        "norm^2 + norm error": np.array(norm**2 + norm * float(found.norm_error) / unit),
        "U^T U": found.u.T @ found.u,
        "V^T V": found.vt @ found.vt.T,
    }
    if params["gap"]:
        view["U S V^T"] = (found.u * s) @ found.vt
    if params["signs"]:
        rows = np.argmax(np.abs(found.u), axis=0)
        view["signs"] = np.sign(found.u[rows, np.arange(found.u.shape[1])])
    return view


def _factors(scale: str) -> Callable[[Ops, Sequence[Array], Params], Sequence[Array]]:
    def run(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
        found = exact.exact_spectrum(ops, inputs[0], params["rank"])
        if scale == "normalized":
            return factors.normalized_factors(ops, found, params["gamma"])
        return factors.gradient_factors(ops, found, params["eta"])

    return run


def _product_view(arrays: Host, inputs: Host, params: Params) -> View:
    lora_A, lora_B = arrays
    # B A is the start; that both sides carry sqrt(S) alike is the other half of the definition.
    return {"B A": lora_B @ lora_A, "A A^T": lora_A @ lora_A.T, "B^T B": lora_B.T @ lora_B}


def _plain(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    return factors.plain_factors(ops, inputs[0], params["rank"], params["out"])


def _precondition(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    lora_A, lora_B, of_a, of_b = inputs
    return precondition.precondition(
        ops, Factors(lora_A, lora_B), Factors(of_a, of_b), params["reg"], params["damping"]
    )


class Problem(NamedTuple):
    """A pair to train and its loss: "linear", <of_a, A> + <of_b, B>, or "matching", 1/2 |B A - M|^2."""

    pair: Factors
    linear: Factors
    product: Array  # M, (out, in)

    def gradient(self, ops: Ops, pair: Factors, loss: str) -> Factors:
        """Of the loss at `pair`, in the dtype of the pair."""
        if loss == "linear":
            return self.linear
        residual = ops.matmul(pair.lora_B, pair.lora_A) - self.product  # (out, in)
        return Factors(
            ops.matmul(ops.matrix_transpose(pair.lora_B), residual),
            ops.matmul(residual, ops.matrix_transpose(pair.lora_A)),
        )


def problems(inputs: Sequence[Array]) -> list[Problem]:
    """The inputs, five arrays each, as problems."""
    fives = [inputs[i : i + 5] for i in range(0, len(inputs), 5)]
    return [Problem(Factors(a, b), Factors(of_a, of_b), product) for a, b, of_a, of_b, product in fives]


def _descend(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    (problem,) = problems(inputs)
    pair = problem.pair
    for _ in range(params["steps"]):
        gradient = problem.gradient(ops, pair, params["loss"])
        pair = step.gradient_descent(ops, pair, gradient, params["rate"], params["reg"], params["damping"])
    return pair


def _adamw(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    found: list[Array] = []
    settings = {name: params[name] for name in ("weight_decay", "reg", "damping")}
    for problem in problems(inputs):
        pair, state = problem.pair, step.start_pair(ops, problem.pair)
        for _ in range(params["steps"]):
            gradient = problem.gradient(ops, pair, params["loss"])
            pair, state = step.adamw(ops, pair, gradient, state, params["rate"], **settings)
        found.extend(pair)
    return found


def _alignment(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    x, y, gradient, lora_A, lora_B = inputs
    return [
        alignment.principal_cosines(ops, x, y),
        alignment.principal_sines(ops, x, y),
        alignment.captured_energy(ops, gradient, Factors(lora_A, lora_B)),
    ]


def _alignment_view(arrays: Host, inputs: Host, params: Params) -> View:
    return dict(zip(("cosines", "sines", "energy"), arrays, strict=True))


COMPUTATIONS: dict[str, Computation] = {
    "asarray, to_numpy": Computation(lambda ops, xs, p: list(xs), _as_they_are, exact=True),
    "astype, at_least_float32": Computation(_narrowed, _as_they_are),
    "matmul": Computation(lambda ops, xs, p: [ops.matmul(*xs)], _as_they_are),
    "matrix_transpose": Computation(lambda ops, xs, p: [ops.matrix_transpose(xs[0])], _as_they_are, exact=True),
    "qr": Computation(_qr, _qr_view),
    "svd": Computation(_svd, _svd_view),
    "svdvals": Computation(lambda ops, xs, p: [ops.svdvals(xs[0])], _as_they_are),
    "cholesky_solve": Computation(_cholesky_solve, _as_they_are),
    "cholesky_solve, not definite": Computation(_cholesky_solve, _indefinite_view),
    "eye": Computation(lambda ops, xs, p: [ops.eye(n, like=xs[0]) for n in (1, 5)], _as_they_are, exact=True),
    "zeros": Computation(
        lambda ops, xs, p: [ops.zeros(shape, like=xs[0]) for shape in ((), (3,), (2, 4))], _as_they_are, exact=True
    ),
    "eps": Computation(lambda ops, xs, p: [xs[0] * ops.eps(xs[0])], _as_they_are, exact=True),
    "sqrt": Computation(lambda ops, xs, p: [ops.sqrt(xs[0])], _as_they_are),
    "sum": Computation(_reductions("sum"), _as_they_are),
    "max": Computation(_reductions("max"), _as_they_are, exact=True),
    "isfinite, comparisons": Computation(_comparison, _as_they_are, exact=True),
    "concat": Computation(lambda ops, xs, p: [ops.concat(xs, axis=axis) for axis in (0, 1)], _as_they_are, exact=True),
    "stack": Computation(lambda ops, xs, p: [ops.stack(xs, axis=axis) for axis in (0, 1)], _as_they_are, exact=True),
    "omega": Computation(_omega, _as_they_are),
    "exact spectrum": Computation(_exact, _spectrum_view, compiled=True),
    "sketch, after each pass": Computation(_sketch, _sketch_view, compiled=True),
    "factors, normalized": Computation(_factors("normalized"), _product_view, compiled=True),
    "factors, gradient": Computation(_factors("gradient"), _product_view),
    "factors, plain": Computation(_plain, _as_they_are),
    "precondition": Computation(_precondition, _as_they_are, compiled=True),
    "gradient descent": Computation(_descend, _as_they_are, compiled=True, cast=True),
    "AdamW": Computation(_adamw, _as_they_are, compiled=True, optimizer=True, cast=True),
    "alignment": Computation(_alignment, _alignment_view),
}
