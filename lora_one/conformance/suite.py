"""Runs the computations on a target and compares them with the vectors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_one.core.ops import Array

from .computations import COMPUTATIONS, Computation, problems
from .target import Target
from .vectors import EPS, Vector, read_vectors

# A result may be this many times further off than the worst of the draws that its amplification was measured with.
SAFETY = 4.0
NARROW_ROUNDING = 2.0**-8  # of bfloat16, to nearest


@dataclass(frozen=True)
class Check:
    """A row: a computation, run eagerly, compiled, or by the backend's own optimizer.

    Attributes:
        mode: "eager", "compiled" or "optimizer".
    """

    computation: str
    mode: str

    @property
    def name(self) -> str:
        """As the table has it."""
        return self.computation if self.mode == "eager" else f"{self.computation}, {self.mode}"


@dataclass(frozen=True)
class Result:
    """What a target came to in a check.

    Attributes:
        error: relative to the largest entry of the answer: the one that is largest over its tolerance.
        tolerance: of that one.
        where: its case and what of the result it is.
        failure: an exception instead of a number.
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
        """Within the tolerance."""
        return not self.failure and self.error <= self.tolerance


def checks() -> list[Check]:
    """All rows, in the order of the table."""
    eager = [Check(name, "eager") for name in COMPUTATIONS]
    compiled = [Check(name, "compiled") for name, c in COMPUTATIONS.items() if c.compiled]
    optimizers = [Check(name, "optimizer") for name, c in COMPUTATIONS.items() if c.optimizer]
    return eager + compiled + optimizers


def applies(check: Check, target: Target) -> bool:
    """Whether the target has anything to run for a check."""
    if check.mode == "compiled" and (target.compile is None or target.dtype == "bfloat16"):
        return False
    return not (check.mode == "optimizer" and target.train is None) and any(_vectors(check, target))


def run(check: Check, target: Target) -> Result:
    """The worst of a check's cases on a target. What the backend raises is a failure and no exception."""
    worst = Result(check.name, target.name, target.device, target.dtype, 0.0, 0.0, "")
    if not applies(check, target):  # nothing run is no pass
        return _result(worst, np.inf, 0.0, "", "the target has nothing to run for this check")
    with target.scope():
        for vector in _vectors(check, target):
            try:
                compared = list(_compare(check, vector, target))
            except Exception as error:
                failure = f"{type(error).__name__}: {error}".split("\n")[0]
                return _result(worst, np.inf, 0.0, vector.name, failure)
            for name, off, allowed in compared:
                if _badness(off, allowed) >= _badness(worst.error, worst.tolerance):
                    worst = _result(worst, off, allowed, f"{vector.name}: {name}")
    return worst


def _vectors(check: Check, target: Target) -> Iterator[Vector]:
    for vector in read_vectors():
        narrow = target.dtype != "bfloat16" or vector.narrow
        if vector.computation == check.computation and narrow and (check.mode != "compiled" or vector.compiled):
            yield vector


def _compare(check: Check, vector: Vector, target: Target) -> Iterator[tuple[str, float, float]]:
    """(what, relative error, tolerance) of everything that is defined of a result."""
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
    """The largest error over the largest entry expected; where that is zero, the error itself. NaN is wrong."""
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
    """Error over tolerance, for ordering; with no tolerance, any error is infinitely bad."""
    if error <= 0.0:
        return 0.0
    return error / tolerance if tolerance > 0.0 else np.inf


def _result(worst: Result, error: float, tolerance: float, where: str, failure: str = "") -> Result:
    fields: dict[str, Any] = {**vars(worst), "error": error, "tolerance": tolerance}
    return Result(**{**fields, "where": where, "failure": failure})
