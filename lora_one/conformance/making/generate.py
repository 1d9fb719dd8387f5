"""Make the vectors: `python -m lora_one.conformance.making.generate`.

Needs scipy and mpmath, for the independent oracle. The answers are the spec's, run by NumPy in float64. Before they are
written, each is compared with an oracle that shares no code with the spec, so that the reference is not its own judge.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_one.conformance.computations import COMPUTATIONS, View
from lora_one.conformance.suite import relative_error
from lora_one.conformance.vectors import EPS, FILE, VERSION

from .cases import Case, all_cases
from .noise import NoisyOps, WorkingOps
from .oracle import oracle

DRAWS = 8
ORACLE_TOLERANCE = 1e-11  # float64's eps times WORST: the spec itself runs in float64
WORST = 2.0**16  # eps of float32 times this is 1 %: no answer may be less certain


def answer(case: Case, ops: WorkingOps) -> View:
    """What the spec gives for a case."""
    computation = COMPUTATIONS[case.computation]
    return computation.view(_run(case, ops), case.inputs, case.params)


def amplifications(case: Case, working: str, exactly: View) -> dict[str, float]:
    """By how much each result errs, relative to its largest entry, per unit of rounding: the worst of some draws."""
    if COMPUTATIONS[case.computation].exact:
        return dict.fromkeys(exactly, 0.0)
    worst = dict.fromkeys(exactly, 1.0)
    for seed in range(DRAWS):
        noisy = answer(case, NoisyOps(EPS[working], seed))
        for name, value in exactly.items():
            worst[name] = max(worst[name], relative_error(noisy[name], value) / EPS[working])
    return worst


def make(file: Path = FILE) -> None:
    """Write all vectors, each checked."""
    store = _Store()
    entries = []
    for case in all_cases():
        answers: dict[str, dict[str, Any]] = {}
        for working in ("float32", "float64"):
            exactly = judged(case, EPS[working])
            grown = amplifications(case, working, exactly)
            for name, by in grown.items():
                if by > WORST:
                    raise ValueError(f"{case.computation}, {case.name}: {name} is known to {by:.1e} eps only")
            answers[working] = {n: (store.key(value), float(f"{grown[n]:.3g}")) for n, value in exactly.items()}
        plain = {name: getattr(case, name) for name in ("computation", "name", "params", "narrow", "compiled")}
        entries.append({**plain, "inputs": [store.key(x) for x in case.inputs], "answers": answers})
    metadata = {"version": str(VERSION), "vectors": json.dumps(entries)}
    save_file(store.arrays, file, metadata=metadata)
    file.chmod(0o644)


class _Store:
    """Arrays by name, each content once."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._keys: dict[tuple[Any, bytes], str] = {}

    def key(self, x: np.ndarray) -> str:
        content = np.ascontiguousarray(x, dtype=np.float64).reshape(np.shape(x))
        found = self._keys.setdefault((content.shape, content.tobytes()), str(len(self._keys)))
        self.arrays[found] = content
        return found


def judged(case: Case, eps: float) -> View:
    """What the spec gives for a case at a working precision, once the oracle has agreed.

    Raises:
        ValueError: it does not.
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
    found = COMPUTATIONS[case.computation].run(ops, case.inputs, case.params)
    return [np.asarray(x, dtype=np.float64) for x in found]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FILE)
    make(parser.parse_args().out)
