"""Make the vectors: `python -m lora_one.conformance.making.generate`.

The answers are those of the spec, run by NumPy in float64. Before an answer is written, it is compared with an oracle
that shares no code with the spec, so that the reference is not its own judge. The oracle needs scipy and mpmath.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_one.conformance.computations import COMPUTATIONS
from lora_one.conformance.suite import relative_error
from lora_one.conformance.types import View
from lora_one.conformance.vectors import EPS, FILE, VERSION

from .cases import Case, all_cases
from .noise import NoisyOps, WorkingOps
from .oracle import oracle

DRAWS = 8
ORACLE_TOLERANCE = 1e-11  # float64's eps times WORST: the spec itself runs in float64
WORST = 2.0**16  # the largest amplification: eps of float32 times this is an uncertainty of 1 %


def answer(case: Case, ops: WorkingOps) -> View:
    """The spec's answer to a case."""
    computation = COMPUTATIONS[case.computation]
    return computation.view(_run(case, ops), case.inputs, case.params)


def amplifications(case: Case, working: str, exactly: View) -> dict[str, float]:
    """The error of each result, relative to its largest entry, per unit of rounding: the worst of `DRAWS` draws."""
    if COMPUTATIONS[case.computation].exact:
        return dict.fromkeys(exactly, 0.0)
    worst = dict.fromkeys(exactly, 1.0)
    for seed in range(DRAWS):
        noisy = answer(case, NoisyOps(EPS[working], seed))
        for name, value in exactly.items():
            worst[name] = max(worst[name], relative_error(noisy[name], value) / EPS[working])
    return worst


def make(file: Path = FILE) -> None:
    """Write all vectors, after the oracle has confirmed each answer."""
    store = _Store()
    entries = []
    for case in all_cases():
        answers: dict[str, dict[str, Any]] = {}
        for working in ("float32", "float64"):
            exactly = judged(case, EPS[working])
            magnified = amplifications(case, working, exactly)
            for name, factor in magnified.items():
                if factor > WORST:
                    raise ValueError(f"{case.computation}, {case.name}: {name} is known to {factor:.1e} eps only")
            answers[working] = {n: (store.key(value), float(f"{magnified[n]:.3g}")) for n, value in exactly.items()}
        fields = {name: getattr(case, name) for name in ("computation", "name", "params", "narrow", "compiled")}
        entries.append({**fields, "inputs": [store.key(x) for x in case.inputs], "answers": answers})
    metadata = {"version": str(VERSION), "vectors": json.dumps(entries)}
    save_file(store.arrays, file, metadata=metadata)
    file.chmod(0o644)


class _Store:
    """Arrays by key, where equal arrays share one key."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._keys: dict[tuple[Any, bytes], str] = {}

    def key(self, x: np.ndarray) -> str:
        content = np.ascontiguousarray(x, dtype=np.float64).reshape(np.shape(x))
        key = self._keys.setdefault((content.shape, content.tobytes()), str(len(self._keys)))
        self.arrays[key] = content
        return key


def judged(case: Case, eps: float) -> View:
    """The spec's answer to a case at a working precision, confirmed by the oracle.

    Raises:
        ValueError: the oracle's answer differs.
    """
    exactly, expected = answer(case, WorkingOps(eps)), oracle(case, eps)
    if expected.keys() != exactly.keys():
        raise ValueError(f"{case.computation}, {case.name}: the oracle has {set(expected)}, the spec {set(exactly)}")
    for name, value in expected.items():
        error = relative_error(exactly[name], np.asarray(value, dtype=np.float64))
        if not error <= ORACLE_TOLERANCE:
            raise ValueError(f"{case.computation}, {case.name}: {name} is {error:.1e} from the oracle")
    return exactly


def _run(case: Case, ops: WorkingOps) -> list[np.ndarray]:
    arrays = COMPUTATIONS[case.computation].run(ops, case.inputs, case.params)
    return [np.asarray(x, dtype=np.float64) for x in arrays]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FILE)
    make(parser.parse_args().out)
