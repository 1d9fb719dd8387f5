"""The committed inputs and float64 answers, in one safetensors file.

Make it again by `python -m lora_one.conformance.making.generate`.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

VERSION = 1  # version of the file; a change of the spec or of the cases needs a new one
FILE = Path(__file__).parent / "vectors.safetensors"
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}  # eps of the working precisions


class Answer(NamedTuple):
    """The right result of a computation, and how much rounding may change it.

    Attributes:
        value: the result, float64.
        amplification: error of the result, relative to its largest entry, over the eps of the arithmetic (see
            `making.noise`).
    """

    value: np.ndarray
    amplification: float


class Vector(NamedTuple):
    """A case with its answers.

    Attributes:
        answers: working precision ("float32", "float64") -> name -> answer. The two differ where the spec adds a
            multiple of eps.
    """

    computation: str
    name: str
    inputs: list[np.ndarray]
    params: dict[str, Any]
    narrow: bool
    compiled: bool
    answers: dict[str, dict[str, Answer]]


@lru_cache
def read_vectors() -> tuple[Vector, ...]:
    """Read all vectors, in the order of the suite."""
    with safe_open(FILE, framework="numpy") as file:
        entries = json.loads(file.metadata()["vectors"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tuple(_vector(entry, arrays) for entry in entries)


def _vector(entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> Vector:
    answers = {
        dtype: {name: Answer(arrays[key], amplification) for name, (key, amplification) in by_name.items()}
        for dtype, by_name in entry["answers"].items()
    }
    inputs = [arrays[key] for key in entry["inputs"]]
    fields = {name: entry[name] for name in ("computation", "name", "params", "narrow", "compiled")}
    return Vector(inputs=inputs, answers=answers, **fields)
