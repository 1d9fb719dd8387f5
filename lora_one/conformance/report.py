"""The results of the suite, as a table and as JSON."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_one.environment import installed_versions

from .suite import Result
from .vectors import VERSION

# The packages that the results depend on.
_PACKAGES = ("lora-one", "numpy", "torch", "jax", "jaxlib", "optax", "mlx")


@dataclass(frozen=True)
class Conformance:
    """The results of a run of the suite, from `check_backend` or `check_installed`.

    Print it to see a table per dtype, each failure and a verdict. Read `passed` in a test, and write `to_dict()` to a
    JSON file to keep the numbers together with the machine and the versions they belong to.

    Attributes:
        results: one `Result` per check that applied, backend and dtype.
        notes: sentences that readers of the results should know, per backend. Default: none.
        versions: the installed versions of the packages that the results depend on. Default: read when it is made.

    Example:
        >>> from lora_one import conformance
        >>> results = conformance.check_installed("numpy", dtype="float32")
        >>> results.passed, len(results.results), results.failures
        (True, 30, [])
        >>> sorted(results.to_dict())
        ['machine', 'notes', 'passed', 'results', 'vectors', 'verdict', 'versions']
    """

    results: Sequence[Result]
    notes: Sequence[str] = ()
    versions: dict[str, str] = field(default_factory=lambda: installed_versions(_PACKAGES))

    @property
    def passed(self) -> bool:
        """Return whether there were checks to run and all of them are within their tolerances."""
        return bool(self.results) and not self.failures

    @property
    def failures(self) -> list[Result]:
        """The results that are not within their tolerances."""
        return [result for result in self.results if not result.passed]

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        if not self.results:
            return "Nothing was run."
        backends = ", ".join(dict.fromkeys(f"{r.backend} on {r.device}" for r in self.results))
        if self.passed:
            return f"All {len(self.results)} checks agree with the spec: {backends}."
        return f"{len(self.failures)} of {len(self.results)} checks are off: {backends}."

    def explain_failures(self) -> str:
        """Describe each failure in one line: what, where, got, allowed."""
        return "\n".join(
            f"{r.check} on {r.backend} in {r.dtype}, {r.where}: "
            + (r.failure or f"relative error {r.error:.1e}, allowed {r.tolerance:.1e}")
            for r in self.failures
        )

    def rows(self, dtype: str) -> tuple[list[str], list[tuple[str, list[Result | None]]]]:
        """The table of a dtype: its backends, and per check its name and the result on each backend."""
        results = [result for result in self.results if result.dtype == dtype]
        backends = list(dict.fromkeys(result.backend for result in results))
        cells = {(result.check, result.backend): result for result in results}
        names = dict.fromkeys(result.check for result in results)
        return backends, [(name, [cells.get((name, backend)) for backend in backends]) for name in names]

    def to_dict(self) -> dict[str, Any]:
        """The results as plain data, for JSON."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "vectors": VERSION,
            "machine": {"system": platform.system(), "processor": platform.machine()},
            "versions": self.versions,
            "notes": list(self.notes),
            "results": [
                {
                    **{name: getattr(r, name) for name in ("check", "backend", "device", "dtype", "where", "passed")},
                    "error": r.error if r.error < float("inf") else None,  # JSON has no infinity
                    "tolerance": r.tolerance,
                    **({"failure": r.failure} if r.failure else {}),
                }
                for r in self.results
            ],
        }

    def __str__(self) -> str:
        lines = []
        for dtype in dict.fromkeys(result.dtype for result in self.results):
            backends, rows = self.rows(dtype)
            lines.append(f"{dtype}: worst relative error / tolerance".ljust(36) + "".join(f"{b:>20}" for b in backends))
            lines.extend(name.ljust(36) + "".join(cell(result).rjust(20) for result in row) for name, row in rows)
            lines.append("")
        return "\n".join([*lines, *filter(None, [self.explain_failures()]), *self.notes, self.verdict])


def cell(result: Result | None) -> str:
    """Format a result for a table: error / tolerance."""
    if result is None:
        return ""
    if result.failure:
        return "failed"
    numbers = f"{result.error:.0e} / {result.tolerance:.0e}" if result.tolerance else f"{result.error:.0e} / 0"
    shown = numbers.replace("e-0", "e-").replace("0e+00", "0")
    return shown if result.passed else f"{shown} OFF"
