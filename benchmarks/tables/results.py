"""The files of benchmarks/results."""

import json
from typing import Any

from benchmarks.harness import RESULTS


def read(name: str) -> Any:
    """Return what a file holds, by its name without the ending."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
