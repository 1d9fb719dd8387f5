"""The suite on a backend: one of yours, or those that are installed."""

from collections.abc import Callable, Iterable
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
    """Hold an array backend to the spec.

    Args:
        ops: the backend: see `lora_one.core.ops.Ops`.
        like: any array of it, on the device and in the dtype (float32 or float64) to check.
        compile: makes a compiled function of a pure one, both from a list of arrays to a list of arrays; None where
            there is no compiler.
        dtype: "float32", "float64" or "bfloat16" (narrow inputs, float32 arithmetic), where `str(like.dtype)` does not
            end in it.
        name: of the backend in the table; by default that of `ops`.

    Returns:
        All results: `passed`, and printing it gives the table. Nothing is raised for a backend that is off.

    Raises:
        ValueError: a dtype that the suite has no answers for.
    """
    found = dtype or next((known for known in DTYPES if str(like.dtype).endswith(known)), None)
    if found not in DTYPES:
        raise ValueError(f"dtype of `like` must be one of {', '.join(DTYPES)}, got {dtype or like.dtype}")
    return _run_all([Target(name or ops.name, found, ops, like, compile, device=str(getattr(like, "device", "cpu")))])


def check_installed(
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Conformance:
    """Hold the backends that come with lora-one to the spec.

    Args:
        backend: one of "numpy", "torch", "jax", "mlx". By default those that the environment variable
            LORA_ONE_BACKENDS names, of which none may be missing, or else those that are installed.
        device: "cpu", "cuda", "gpu", ...; by default what each framework would take.
        dtype: "float32", "float64" or "bfloat16"; by default all three.
        progress: told what is run next.

    Raises:
        BackendError, ConfigError: what is asked for is not there, or does not exist.
    """
    targets = [
        target
        for name in backends(backend)
        for kind in ([dtype] if dtype else DTYPES)
        if (target := open_target(name, kind, device)) is not None
    ]
    return _run_all(targets, progress)


def _run_all(targets: Iterable[Target], progress: Callable[[str], None] = lambda text: None) -> Conformance:
    results, notes = [], []
    for target in targets:
        for check in checks():
            if applies(check, target):
                progress(f"{target.name}, {target.dtype}: {check.name}")
                results.append(run(check, target))
        if target.note:
            notes.append(f"{target.name}: {target.note}")
    return Conformance(results, list(dict.fromkeys(notes)))
