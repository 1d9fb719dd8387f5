"""Run the whole suite on a backend of your own, or on those that are installed."""

from collections.abc import Callable, Sequence
from typing import Any

from lora_one.core.ops import Array, Ops

from .report import Conformance
from .suite import applies, checks, run
from .target import Target
from .targets import DTYPES, backends, open_target


def check_backend(
    ops: Ops,
    like: Array,
    compile: Callable[[Any], Any] | None = None,
    dtype: str | None = None,
    name: str | None = None,
) -> Conformance:
    """Check an array backend of your own against the spec.

    Use it while you write a backend, and in its tests. Every primitive and every step of the algorithm runs on
    committed inputs, and the results are compared with committed answers.

    Args:
        ops: an object with the methods of `lora_one.core.ops.Ops`.
        like: any array of the backend, on the device and in the dtype (float32 or float64) to check.
        compile: turns a pure function from a list of arrays to a list of arrays into a compiled one. Default None:
            there is no compiler, and only the eager checks run.
        dtype: "float32", "float64" or "bfloat16" (narrow inputs, float32 arithmetic). Default: read from
            `str(like.dtype)`.
        name: name of the backend in the table. Default: `ops.name`.

    Returns:
        All results. Print it to see the table, or read `passed`. A wrong result is part of it and raises nothing.

    Raises:
        ValueError: the suite has no answers for the dtype.

    Example:
        >>> import numpy as np
        >>> from lora_one.backends.numpy import NumpyOps
        >>> class WrongOps(NumpyOps):
        ...     def svdvals(self, x):
        ...         return super().svdvals(x) ** 2
        >>> result = check_backend(WrongOps(), like=np.zeros((), np.float64), name="mine")
        >>> result.verdict
        '2 of 30 checks are off: mine on cpu.'
        >>> [failure.check for failure in result.failures]
        ['svdvals', 'alignment']
    """
    kind = dtype or next((name for name in DTYPES if str(like.dtype).endswith(name)), None)
    if kind not in DTYPES:
        raise ValueError(f"dtype of `like` must be one of {', '.join(DTYPES)}, got {dtype or like.dtype}")
    return _run_all([Target(name or ops.name, kind, ops, like, compile, device=str(getattr(like, "device", "cpu")))])


def check_installed(
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conformance:
    """Check the backends that come with lora-one against the spec, as `lora-one conformance` does.

    Use it on a new machine, or after an upgrade of a framework, to see whether all backends still compute the same
    numbers there. All of them take a minute or two on a CPU.

    Args:
        backend: "numpy", "torch", "jax" or "mlx". Default None: those that the environment variable
            LORA_ONE_BACKENDS names, none of which may be missing; without it, those that are installed.
        device: "cpu", "cuda", "gpu", ... Default None: the default device of each framework.
        dtype: "float32", "float64" or "bfloat16". Default None: all three.
        progress: told after each check how many are done, and how many there are. Default: a function that does
            nothing.

    Returns:
        All results. Print it to see the table, or read `passed`.

    Raises:
        BackendError: a backend that you or the environment asked for is not installed.
        ConfigError: there is no backend, device or dtype of that name.

    Example:
        >>> print(check_installed("numpy", dtype="float64").verdict)
        All 30 checks agree with the spec: numpy on cpu.
    """
    targets = [
        target
        for name in backends(backend)
        for kind in ([dtype] if dtype else DTYPES)
        if (target := open_target(name, kind, device)) is not None
    ]
    return _run_all(targets, progress)


def _run_all(targets: Sequence[Target], progress: Callable[[int, int], None] = lambda done, total: None) -> Conformance:
    jobs = [(check, target) for target in targets for check in checks() if applies(check, target)]
    results = []
    for check, target in jobs:
        results.append(run(check, target))
        progress(len(results), len(jobs))
    notes = [f"{target.name}: {target.note}" for target in targets if target.note]
    return Conformance(results, list(dict.fromkeys(notes)))
