"""The figures of the paper's theory (arXiv 2502.01235): docs/images/theory-*.png, and results/theory.json.

    python -m benchmarks.theory [--backend numpy|torch|jax|mlx] [--only alignment preconditioning portrait relu]

All of it by the functions of `lora_one.core`, in float64, on any backend; from 5 seconds (NumPy) to 40.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lora_one.backends import BACKENDS

from . import alignment, portrait, preconditioning, relu
from .arrays import Arrays

FIGURES = {"alignment": alignment, "preconditioning": preconditioning, "portrait": portrait, "relu": relu}
ROOT = Path(__file__).parents[2]


def rounded(x: Any) -> Any:
    """Six digits of every number, in nested lists and dictionaries."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def main() -> None:
    """Measure, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="numpy", choices=list(BACKENDS))
    parser.add_argument("--only", nargs="*", default=list(FIGURES), choices=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "theory.json")
    options = parser.parse_args()
    os.environ.setdefault("JAX_ENABLE_X64", "1")  # JAX reads it when it is imported
    arrays = Arrays(options.backend)
    found = json.loads(options.result.read_text()) if options.result.exists() else {}
    for name in options.only:
        began = time.perf_counter()
        found[name] = rounded(FIGURES[name].measure(arrays))
        print(f"{name}: {time.perf_counter() - began:.1f} s on {options.backend}", flush=True)
        figure = Figure(figsize=(5, 3.6) if name == "relu" else (9, 3.6), layout="constrained")
        FIGURES[name].draw(found[name], figure)
        for axes in figure.axes:
            axes.grid(alpha=0.25)
        figure.savefig(options.docs / f"theory-{name}.png", dpi=110)
        options.result.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
