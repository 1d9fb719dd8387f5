"""What the suite runs on: one backend on one device in one dtype."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lora_one.core.ops import Array, Ops

from .computations import Problem

Arrays = Sequence[Array]


@dataclass(frozen=True)
class Target:
    """A backend to hold to the spec.

    Attributes:
        name: of the backend, for the table.
        dtype: "float32", "float64" or "bfloat16": of the inputs. The arithmetic is float32 at least.
        ops: the backend's `Ops`.
        like: any array of the backend, of that dtype and on the device to run on.
        compile: a pure function of a list of arrays, which returns such a list, compiled; None if there is no compiler.
        train: (problems, settings) -> the factors A, B, A, B, ... after so many steps of the backend's own AdamW for
            LoRA; None if there is none.
        optimizer_error: what that AdamW is known to err by beyond the spec, in eps; `note` says why.
        scope: what must be in force while it runs.
        note: anything that whoever reads the results should know.
    """

    name: str
    dtype: str
    ops: Ops
    like: Array
    compile: Callable[[Callable[[Arrays], Arrays]], Callable[[Arrays], Arrays]] | None = None
    train: Callable[[Sequence[Problem], Mapping[str, Any]], Arrays] | None = None
    optimizer_error: float = 0.0
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    device: str = "cpu"
    note: str = ""
