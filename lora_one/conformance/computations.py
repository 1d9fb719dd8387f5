"""The computations of the suite: every primitive of `Ops` and every step of the spec.

A computation has two halves. `run` is pure array code, executed by the backend under test, eagerly or compiled. `view`
is executed on the host in float64, and turns the results into numbers that the mathematics defines: products,
projectors and singular values instead of columns, which may rotate.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lora_one.core import alignment, exact, factors, precondition, step
from lora_one.core.factors import Factors
from lora_one.core.ops import Array, Ops

from . import deferred, spectra
from .types import Host, Params, View


class Computation(NamedTuple):
    """A computation, and how the suite runs and compares it.

    Attributes:
        run: (ops, inputs, params) -> arrays, on the backend.
        view: (those arrays in float64, inputs, params) -> the numbers to compare, by name.
        exact: whether no rounding is allowed at all.
        compiled: whether it also runs compiled.
        optimizer: whether a backend's own optimizer must give the same result.
        cast: whether results come back in the dtype of the inputs, also where that is narrow.
    """

    run: Callable[[Ops, Sequence[Array], Params], Sequence[Array]]
    view: Callable[[Host, Host, Params], View]
    exact: bool = False
    compiled: bool = False
    optimizer: bool = False
    cast: bool = False


def _unchanged(arrays: Host, inputs: Host, params: Params) -> View:
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
    """Show which matrices of the batch came back as NaN, and the values of the others."""
    nan = np.isnan(arrays[0])
    return {"NaN": nan.astype(np.float64), "the others": np.where(nan, 0.0, arrays[0])}


def _reductions(name: str) -> Callable[[Ops, Sequence[Array], Params], Sequence[Array]]:
    def run(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
        reduce, x = getattr(ops, name), inputs[0]
        return [reduce(x), reduce(x, axis=0), reduce(x, axis=-1)]

    return run


def _narrowed(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    """Compute in float32 at least, and narrow the input again: the second result is the input itself."""
    x = inputs[0]
    wide = ops.at_least_float32(x)
    return [wide / 3.0, ops.astype(wide, x.dtype)]


def _comparison(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    x = inputs[0]
    return [ops.astype(ops.isfinite(x), x.dtype), ops.astype(x == 0, x.dtype), ops.astype(x >= -x, x.dtype)]


def _where(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    """Choose entries, also where the other one is not finite, and by a condition that is broadcast."""
    x, y = inputs
    return [ops.where(ops.isfinite(x), x, y), ops.where(y[:, :1] > 0, y, ops.zeros((), like=y))]


# --- steps ------------------------------------------------------------------------------------------------------------


def _factors(scale: str) -> Callable[[Ops, Sequence[Array], Params], Sequence[Array]]:
    def run(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
        spectrum = exact.exact_spectrum(ops, inputs[0], params["rank"])
        if scale == "normalized":
            return factors.normalized_factors(ops, spectrum, params["gamma"], params["balance"])
        return factors.gradient_factors(ops, spectrum, params["eta"], params["balance"])

    return run


def _product_view(arrays: Host, inputs: Host, params: Params) -> View:
    lora_A, lora_B = arrays
    # The definition has two halves: the product B A, and the share of it that each factor carries.
    return {"B A": lora_B @ lora_A, "A A^T": lora_A @ lora_A.T, "B^T B": lora_B.T @ lora_B}


def _plain(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    return factors.plain_factors(ops, inputs[0], params["rank"], params["out"])


def _precondition(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    lora_A, lora_B, gradient_a, gradient_b = inputs
    pair, gradient = Factors(lora_A, lora_B), Factors(gradient_a, gradient_b)
    return precondition.precondition(ops, pair, gradient, params["reg"], params["damping"])


class Problem(NamedTuple):
    """A pair to train, and two losses: "linear", <L_A, A> + <L_B, B>, and "matching", 1/2 |B A - M|^2."""

    pair: Factors
    linear: Factors  # (L_A, L_B)
    product: Array  # M, (out, in)

    def gradient(self, ops: Ops, pair: Factors, loss: str) -> Factors:
        """The gradient of a loss, "linear" or "matching", at `pair`, in the dtype of the pair."""
        if loss == "linear":
            return self.linear
        residual = ops.matmul(pair.lora_B, pair.lora_A) - self.product  # (out, in)
        return Factors(
            ops.matmul(ops.matrix_transpose(pair.lora_B), residual),
            ops.matmul(residual, ops.matrix_transpose(pair.lora_A)),
        )


def problems(inputs: Sequence[Array]) -> list[Problem]:
    """Group the inputs, five arrays per problem."""
    groups = [inputs[i : i + 5] for i in range(0, len(inputs), 5)]
    return [Problem(Factors(a, b), Factors(linear_a, linear_b), m) for a, b, linear_a, linear_b, m in groups]


def _descend(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    (problem,) = problems(inputs)
    pair = problem.pair
    for _ in range(params["steps"]):
        gradient = problem.gradient(ops, pair, params["loss"])
        pair = step.gradient_descent(ops, pair, gradient, params["rate"], params["reg"], params["damping"])
    return pair


def _adamw(ops: Ops, inputs: Sequence[Array], params: Params) -> Sequence[Array]:
    trained: list[Array] = []
    settings = {name: params[name] for name in ("weight_decay", "reg", "damping")}
    for problem in problems(inputs):
        pair, state = problem.pair, step.start_pair(ops, problem.pair)
        for _ in range(params["steps"]):
            gradient = problem.gradient(ops, pair, params["loss"])
            pair, state = step.adamw(ops, pair, gradient, state, params["rate"], **settings)
        trained.extend(pair)
    return trained


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
    "asarray, to_numpy": Computation(lambda ops, xs, p: list(xs), _unchanged, exact=True),
    "astype, at_least_float32": Computation(_narrowed, _unchanged),
    "matmul": Computation(lambda ops, xs, p: [ops.matmul(*xs)], _unchanged),
    "matrix_transpose": Computation(lambda ops, xs, p: [ops.matrix_transpose(xs[0])], _unchanged, exact=True),
    "qr": Computation(_qr, _qr_view),
    "svd": Computation(_svd, _svd_view),
    "svdvals": Computation(lambda ops, xs, p: [ops.svdvals(xs[0])], _unchanged),
    "cholesky_solve": Computation(_cholesky_solve, _unchanged),
    "cholesky_solve, not definite": Computation(_cholesky_solve, _indefinite_view),
    "eye": Computation(lambda ops, xs, p: [ops.eye(n, like=xs[0]) for n in (1, 5)], _unchanged, exact=True),
    "zeros": Computation(
        lambda ops, xs, p: [ops.zeros(shape, like=xs[0]) for shape in ((), (3,), (2, 4))], _unchanged, exact=True
    ),
    "eps": Computation(lambda ops, xs, p: [xs[0] * ops.eps(xs[0])], _unchanged, exact=True),
    "sqrt": Computation(lambda ops, xs, p: [ops.sqrt(xs[0])], _unchanged),
    "sum": Computation(_reductions("sum"), _unchanged),
    "max": Computation(_reductions("max"), _unchanged, exact=True),
    "isfinite, comparisons": Computation(_comparison, _unchanged, exact=True),
    "concat": Computation(lambda ops, xs, p: [ops.concat(xs, axis=axis) for axis in (0, 1)], _unchanged, exact=True),
    "where": Computation(_where, _unchanged, exact=True),
    "stack": Computation(lambda ops, xs, p: [ops.stack(xs, axis=axis) for axis in (0, 1)], _unchanged, exact=True),
    "omega": Computation(spectra.drawn_omega, _unchanged),
    "exact spectrum": Computation(spectra.exact_spectrum, spectra.spectrum_view, compiled=True),
    "fold, after each batch": Computation(spectra.folded_spectra, spectra.fold_view, compiled=True),
    "factors, normalized": Computation(_factors("normalized"), _product_view, compiled=True),
    "factors, gradient": Computation(_factors("gradient"), _product_view),
    "factors, plain": Computation(_plain, _unchanged),
    "start without data": Computation(deferred.deferred_start, deferred.deferred_view, compiled=True),
    "precondition": Computation(_precondition, _unchanged, compiled=True),
    "gradient descent": Computation(_descend, _unchanged, compiled=True, cast=True),
    "AdamW": Computation(_adamw, _unchanged, compiled=True, optimizer=True, cast=True),
    "alignment": Computation(_alignment, _alignment_view),
}
