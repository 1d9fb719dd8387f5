"""How well does the sketch know what it is still missing, and what do starts hold that end by it?

    python -m benchmarks.passes            # five minutes on one core; benchmarks/results/passes.json
    python -m benchmarks.passes --smoke    # made-up spectra alone, two ranks

Gradients of Llamas with random weights (those of `benchmarks.init`), of a pretrained encoder, and made-up spectra:
after each number of passes, the share of the best rank-r energy that the worst layer's sketch holds, and the least
share that it tells. The passes of `Config(passes="auto")` end where 0.99 is told of all layers.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks import harness
from benchmarks.init_models import prepared
from lora_one.backends.numpy import ops
from lora_one.config import AUTO_PASSES, Config
from lora_one.core.omega import draw_omega
from lora_one.core.sketch import advance_on, finish, start
from lora_one.passes import ENOUGH
from lora_one.report import share_of_best

RESULT = harness.RESULTS / "passes.json"
RANKS = (4, 8, 16, 32)
MODELS = ("97.5M", "0.5B", "1.1B", "1.1B, 1024 tokens")
SPECTRA = {
    "linear, 1 to 0.5": np.linspace(1.0, 0.5, 240),
    "linear, 1 to 0.5, long": np.linspace(1.0, 0.5, 2000),
    "linear, 1 to 0.9": np.linspace(1.0, 0.9, 500),
    "linear, 1 to 0": np.linspace(1.0, 0.01, 240),
    "i^-0.1": np.arange(1, 769) ** -0.1,
    "i^-0.25": np.arange(1, 769) ** -0.25,
    "i^-0.5": np.arange(1, 769) ** -0.5,
    "0.99^i": 0.99 ** np.arange(768),
    "random entries": np.linalg.svd(np.random.default_rng(0).standard_normal((768, 768)), compute_uv=False),
    "4 above flat": np.concatenate([np.ones(4), np.full(764, 0.3)]),
    "4 above linear": np.concatenate([np.ones(4), np.linspace(0.8, 0.1, 764)]),
    "steps": np.concatenate([np.ones(2), np.full(10, 0.5), np.full(100, 0.4), np.full(600, 0.1)]),
}


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    sources, ranks = (spectra(), RANKS[:2]) if options.smoke else (every_source(), RANKS)
    rows = [row for source, layers in sources for row in measured(source, layers, ranks)]
    print(table(rows))
    options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def every_source() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(name, gradient by layer) of each model and spectrum."""
    for case in MODELS:
        tensors = load_file(prepared(case) / "gradients" / "exact.safetensors")
        yield case, {name: g.astype(np.float64) for name, g in tensors.items() if not name.endswith(".best")}
    from benchmarks.energy import exact_gradients
    from benchmarks.minilm import docstring_pairs, load_minilm, pair_batches

    encoder, tokenizer = load_minilm()
    yield "MiniLM", exact_gradients(encoder, pair_batches(tokenizer, docstring_pairs(64), 16))
    yield from spectra()


def spectra() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Matrices with a made-up spectrum: as many inputs as singular values, or twice as many."""
    # The test matrix is Gaussian, so that the singular vectors do not matter.
    for name, s in SPECTRA.items():
        square = np.diag(s / s[0])
        yield name, {"square": square}
        yield f"{name}, wide", {"wide": np.concatenate([square, np.zeros_like(square)], axis=1)}


def measured(source: str, layers: dict[str, np.ndarray], ranks: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A row a rank: what the worst layer holds, and is told to hold, after each number of passes."""
    energies = {name: np.linalg.svd(g, compute_uv=False) ** 2 for name, g in layers.items()}
    for rank in ranks:
        width = Config(rank=rank).oversample + rank
        shares = {
            name: shares_of(g, name, rank, width, float(np.sum(energies[name][:rank])))
            for name, g in layers.items()
            if 3 * width < min(g.shape)  # what is smaller is seen whole in a few passes
        }
        if not shares:
            continue
        told = [min(found[i][1] for found in shares.values()) for i in range(len(AUTO_PASSES))]
        held = [min(found[i][0] for found in shares.values()) for i in range(len(AUTO_PASSES))]
        end = next((i for i, share in enumerate(told) if share >= ENOUGH), len(told) - 1)
        yield {
            "source": source,
            "rank": rank,
            "layers": len(shares),
            "passes": AUTO_PASSES[end],
            "held": held[end],
            "told": told[end],
            "needed": next((AUTO_PASSES[i] for i, share in enumerate(held) if share >= ENOUGH), None),
            "held by passes": held,
            "told by passes": told,
        }


def shares_of(g: np.ndarray, name: str, rank: int, width: int, best: float) -> list[tuple[float, float]]:
    """(share held, share told) after each of AUTO_PASSES."""
    state = start(ops, draw_omega(0, name, g.shape[1], width), g.shape[0])
    found: list[tuple[float, float]] = []
    for number in range(1, AUTO_PASSES[-1] + 1):
        state = advance_on(ops, state, g)
        if number in AUTO_PASSES:
            spectrum = finish(ops, state, rank)
            found.append((float(np.sum(spectrum.s**2) / best), share_of_best(spectrum)))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    header = ["", "r", "layers", "passes", "held", "told", "needed", *(f"held, told after {n}" for n in (4, 6, 8))]
    at = [AUTO_PASSES.index(n) for n in (4, 6, 8)]
    return harness.table(
        header,
        [
            [
                *(row[key] for key in ("source", "rank", "layers", "passes")),
                *(f"{row[key]:.3f}" for key in ("held", "told")),
                row["needed"] or "",
                *(f"{row['held by passes'][i]:.3f}, {row['told by passes'][i]:.3f}" for i in at),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
