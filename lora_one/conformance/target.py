"""The things that the suite can run on: one backend on one device in one dtype."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lora_one.core.ops import Array, Ops

from .computations import Problem

Arrays = Sequence[Array]


@dataclass(frozen=True)
class Target:
    """A backend to hold to the spec, on one device and in one dtype.

    `check_backend` makes one for you. Build it yourself to run single checks, for instance as the rows of a test suite,
    or to check your own optimizer through `train`.

    Attributes:
        name: name of the backend, for the table.
        dtype: dtype of the inputs: "float32", "float64" or "bfloat16". The arithmetic is float32 at least.
        ops: the backend's `Ops`.
        like: any array of the backend, of that dtype and on the device to run on.
        compile: turns a pure function from a list of arrays to a list of arrays into a compiled one. Default None:
            there is no compiler, and the compiled checks do not apply.
        train: (problems, settings) -> the factors A, B, A, B, ... after `settings["steps"]` steps of the backend's own
            AdamW for LoRA. Default None: there is none, and its checks do not apply.
        optimizer_error: the known error of that AdamW beyond the spec, in eps, default 0; `note` says why.
        scope: makes a context manager that is entered while checks run. Default: one that does nothing.
        device: name of the device, for the table. Default "cpu".
        note: a sentence for readers of the results. Default "".

    Example:
        >>> import numpy as np
        >>> from lora_one.backends.numpy import NumpyOps
        >>> from lora_one.conformance import applies, checks
        >>> target = Target("mine", "float32", NumpyOps(), like=np.zeros((), np.float32))
        >>> len([check for check in checks() if applies(check, target)])  # no compiler, no optimizer
        30
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
