"""Run the computations on a target and compare the results with the vectors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_one.core.ops import Array

from .computations import COMPUTATIONS, Computation, problems
from .target import Target
from .vectors import EPS, Vector, read_vectors

# The amplification is the worst of a few random draws: a result may be this many times further off.
SAFETY = 4.0
NARROW_ROUNDING = 2.0**-8  # relative error of rounding to the nearest bfloat16


@dataclass(frozen=True)
class Check:
    """A row of the table: one computation in one mode of execution.

    `checks()` lists all rows. `applies` says which of them a target can run, and `run` gives the `Result`. Use them
    when each row is to be a test of its own.

    Attributes:
        computation: the name of the computation, for example "qr" or "AdamW".
        mode: "eager", "compiled", or "optimizer" (the backend's own optimizer instead of the spec's).

    Example:
        >>> [check.name for check in checks() if check.computation == "AdamW"]
        ['AdamW', 'AdamW, compiled', 'AdamW, optimizer']
    """

    computation: str
    mode: str

    @property
    def name(self) -> str:
        """The name of the row in the table."""
        return self.computation if self.mode == "eager" else f"{self.computation}, {self.mode}"


@dataclass(frozen=True)
class Result:
    """The result of a check on a target: the worst of all its cases.

    The worst is the error that is largest in units of its tolerance. `passed` says whether it is within the tolerance,
    and `where` says which case and which part of the result it belongs to.

    Attributes:
        check: name of the check.
        backend: name of the target.
        device: its device.
        dtype: dtype of the inputs.
        error: the worst error, relative to the largest entry of the answer.
        tolerance: the tolerance of that error.
        where: "case: part of the result".
        failure: the exception that the backend raised, as text. Default "": it raised none.

    Example:
        >>> import numpy as np
        >>> from lora_one.backends.numpy import NumpyOps
        >>> target = Target("mine", "float64", NumpyOps(), like=np.zeros((), np.float64))
        >>> result = run(Check("matmul", "eager"), target)
        >>> result.passed, result.error <= result.tolerance
        (True, True)
    """

    check: str
    backend: str
    device: str
    dtype: str
    error: float
    tolerance: float
    where: str
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the error is within the tolerance."""
        return not self.failure and self.error <= self.tolerance


def checks() -> list[Check]:
    """List all checks, in the order of the table.

    Use it with `applies` and `run` to make each check a test of its own.

    Returns:
        First every computation run eagerly, then those that also run compiled, then those that a backend's own
        optimizer must reproduce.

    Example:
        >>> len(checks()), checks()[0]
        (38, Check(computation='asarray, to_numpy', mode='eager'))
    """
    eager = [Check(name, "eager") for name in COMPUTATIONS]
    compiled = [Check(name, "compiled") for name, c in COMPUTATIONS.items() if c.compiled]
    optimizers = [Check(name, "optimizer") for name, c in COMPUTATIONS.items() if c.optimizer]
    return eager + compiled + optimizers


def applies(check: Check, target: Target) -> bool:
    """Return whether a target has anything to run for a check.

    Use it to leave out checks before `run`: a check that does not apply fails there. Compiled checks need
    `target.compile`, optimizer checks need `target.train`, and few checks have inputs for bfloat16.

    Args:
        check: one of `checks()`.
        target: the backend, device and dtype.

    Example:
        >>> import numpy as np
        >>> from lora_one.backends.numpy import NumpyOps
        >>> target = Target("mine", "float32", NumpyOps(), like=np.zeros((), np.float32))
        >>> applies(Check("AdamW", "eager"), target), applies(Check("AdamW", "compiled"), target)
        (True, False)
    """
    if check.mode == "compiled" and (target.compile is None or target.dtype == "bfloat16"):
        return False
    return not (check.mode == "optimizer" and target.train is None) and any(_vectors(check, target))


def run(check: Check, target: Target) -> Result:
    """Run all cases of a check on a target, and return the worst result.

    Use it for single checks; `check_backend` runs all of them. An exception in the backend becomes the `failure` of the
    result. A check that has nothing to run on this target fails too, because nothing was checked.

    Args:
        check: one of `checks()`.
        target: the backend, device and dtype.

    Example:
        >>> import numpy as np
        >>> from lora_one.backends.numpy import NumpyOps
        >>> target = Target("mine", "float32", NumpyOps(), like=np.zeros((), np.float32))
        >>> run(Check("matrix_transpose", "eager"), target).error
        0.0
        >>> run(Check("AdamW", "compiled"), target).failure
        'the target has nothing to run for this check'
    """
    worst = Result(check.name, target.name, target.device, target.dtype, 0.0, 0.0, "")
    if not applies(check, target):
        return _result(worst, np.inf, 0.0, "", "the target has nothing to run for this check")
    with target.scope():
        for vector in _vectors(check, target):
            try:
                compared = list(_compare(check, vector, target))
            except Exception as raised:
                failure = f"{type(raised).__name__}: {raised}".split("\n")[0]
                return _result(worst, np.inf, 0.0, vector.name, failure)
            for name, error, tolerance in compared:
                if _badness(error, tolerance) >= _badness(worst.error, worst.tolerance):
                    worst = _result(worst, error, tolerance, f"{vector.name}: {name}")
    return worst


def _vectors(check: Check, target: Target) -> Iterator[Vector]:
    for vector in read_vectors():
        narrow = target.dtype != "bfloat16" or vector.narrow
        if vector.computation == check.computation and narrow and (check.mode != "compiled" or vector.compiled):
            yield vector


def _compare(check: Check, vector: Vector, target: Target) -> Iterator[tuple[str, float, float]]:
    """Yield (name, relative error, tolerance) of each part of a result."""
    computation = COMPUTATIONS[check.computation]
    inputs = [target.ops.asarray(x, like=target.like) for x in vector.inputs]
    arrays = _execute(check, computation, vector, inputs, target)
    on_host = [np.asarray(target.ops.to_numpy(x), dtype=np.float64) for x in arrays]
    view = computation.view(on_host, vector.inputs, vector.params)
    working = "float64" if target.dtype == "float64" else "float32"
    rounding = 0.0
    if target.dtype == "bfloat16" and computation.cast:
        rounding = NARROW_ROUNDING
        wide = [i for i, x in enumerate(arrays) if x.dtype != target.like.dtype]
        yield "dtype of the result", float(len(wide)), 0.0
    for name, answer in vector.answers[working].items():
        tolerance = SAFETY * EPS[working] * answer.amplification + rounding
        if check.mode == "optimizer":
            tolerance += EPS[working] * target.optimizer_error
        yield name, relative_error(view[name], answer.value), tolerance


def _execute(
    check: Check, computation: Computation, vector: Vector, inputs: Sequence[Array], target: Target
) -> Sequence[Array]:
    if check.mode == "optimizer" and target.train is not None:
        return target.train(problems(inputs), vector.params)

    def pure(arrays: Sequence[Array]) -> list[Array]:
        return list(computation.run(target.ops, arrays, vector.params))

    if check.mode == "compiled" and target.compile is not None:
        return target.compile(pure)(list(inputs))
    return pure(inputs)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest error, relative to the largest expected entry, or absolute if that is 0. An unexpected NaN is inf."""
    if got.shape != expected.shape:
        return np.inf
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    if same.all():
        return 0.0
    finite = np.abs(expected[np.isfinite(expected)])
    scale = float(np.max(finite, initial=0.0)) or 1.0
    error = float(np.max(np.abs(np.where(same, 0.0, got - expected)), initial=0.0)) / scale
    return error if np.isfinite(error) else np.inf


def _badness(error: float, tolerance: float) -> float:
    """Error over tolerance, to sort results by. Without a tolerance, any error is infinitely bad."""
    if error <= 0.0:
        return 0.0
    return error / tolerance if tolerance > 0.0 else np.inf


def _result(worst: Result, error: float, tolerance: float, where: str, failure: str = "") -> Result:
    fields: dict[str, Any] = {**vars(worst), "error": error, "tolerance": tolerance}
    return Result(**{**fields, "where": where, "failure": failure})
