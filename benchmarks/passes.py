"""How well does a start know what it is still missing?

    python -m benchmarks.passes            # twenty minutes on one core; benchmarks/results/passes.json
    python -m benchmarks.passes --smoke    # made-up spectra alone, two ranks

Gradients of Llamas with random weights (those of `benchmarks.init`), of a pretrained encoder in its batches, and
made-up spectra: after each number of passes, the share of the best rank-r energy that the worst layer's start holds,
and the least share that it tells. `Config(passes="auto")` makes the second pass where less than 0.95 is told of
a layer.
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
from lora_one.config import Config
from lora_one.core.fold import TEST_COLUMNS, FoldState, finish_fold, fold, of_mean, read_both_sides, start_fold
from lora_one.core.omega import draw_omega
from lora_one.core.sides import Products
from lora_one.passes import ENOUGH
from lora_one.report import share_of_best

RESULT = harness.RESULTS / "passes.json"
RANKS = (4, 8, 16, 32)
PASSES = (1, 2, 3, 4)
MODELS = ("97.5M", "0.5B", "1.1B")
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


Layers = dict[str, list[np.ndarray]]  # per layer the gradient of each batch


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    sources, ranks = (spectra(), RANKS[:2]) if options.smoke else (every_source(), RANKS)
    rows = []
    for source, layers in sources:
        rows += measured(source, layers, ranks)
        options.out.write_text(json.dumps({"enough": ENOUGH, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def every_source() -> Iterator[tuple[str, Layers]]:
    """(name, gradients by layer) of each model and spectrum."""
    from benchmarks.energy import exact_gradients
    from benchmarks.minilm import docstring_pairs, load_minilm, pair_batches

    encoder, tokenizer = load_minilm()
    of_batches = [exact_gradients(encoder, [batch]) for batch in pair_batches(tokenizer, docstring_pairs(64), 16)]
    yield "MiniLM", {name: [gradients[name] for gradients in of_batches] for name in of_batches[0]}
    yield from spectra()
    for case in MODELS:
        tensors = load_file(prepared(case) / "gradients" / "exact.safetensors")
        yield case, {name: [g.astype(np.float64)] for name, g in tensors.items() if not name.endswith(".best")}


def spectra() -> Iterator[tuple[str, Layers]]:
    """Square matrices with a made-up spectrum. The test matrix is Gaussian, so that their bases do not matter."""
    for name, s in SPECTRA.items():
        yield name, {"matrix": [np.diag(s / s[0])]}


def measured(source: str, layers: Layers, ranks: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A row a rank: what the worst layer holds, and is told to hold, after each number of passes."""
    energies = {name: _energies(sum(gs) / len(gs)) for name, gs in layers.items()}
    for rank in ranks:
        width = rank + Config().oversample
        shares = {
            name: shares_of(gs, name, rank, width, float(np.sum(energies[name][:rank])))
            for name, gs in layers.items()
            if 3 * width < min(gs[0].shape)  # what is smaller is seen whole at once
        }
        if not shares:
            continue
        held = [min(of[i][0] for of in shares.values()) for i in range(len(PASSES))]
        told = [min(of[i][1] for of in shares.values()) for i in range(len(PASSES))]
        ends = 0 if told[0] >= ENOUGH else 1
        yield {
            "source": source,
            "rank": rank,
            "layers": len(shares),
            "auto makes": PASSES[ends],
            "auto holds": held[ends],
            "held by passes": held,
            "told by passes": told,
            "told too much": max(told - held for of in shares.values() for held, told in of),
        }


def shares_of(gradients: list[np.ndarray], name: str, rank: int, width: int, best: float) -> list[tuple[float, float]]:
    """(share held, share told) after each of PASSES."""
    out_features, in_features = gradients[0].shape
    test = draw_omega(0, f"{name}, test", in_features, TEST_COLUMNS)
    state = start_fold(ops, draw_omega(0, name, in_features, width), out_features, test)
    for g in gradients:
        state = fold(ops, state, g)
    state = of_mean(ops, state, len(gradients))
    g = sum(gradients) / len(gradients)
    found = [_held_and_told(state, g, rank, best)]
    for _ in PASSES[1:]:
        state = read_both_sides(ops, state, Products(g @ state.v, g.T @ state.u))
        found.append(_held_and_told(state, g, rank, best))
    return found


def _energies(g: np.ndarray) -> np.ndarray:
    """The squared singular values, descending."""
    gram = g @ g.T if g.shape[0] < g.shape[1] else g.T @ g
    return np.linalg.eigvalsh(gram)[::-1]


def _held_and_told(state: FoldState, g: np.ndarray, rank: int, best: float) -> tuple[float, float]:
    spectrum = finish_fold(ops, state, rank)
    return float(np.sum((spectrum.u.T @ g @ spectrum.vt.T) ** 2) / best), share_of_best(spectrum)


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    header = ["", "r", "layers", "auto makes", "auto holds", *(f"held, told after {n}" for n in PASSES)]
    return harness.table(
        header,
        [
            [
                *(row[key] for key in ("source", "rank", "layers", "auto makes")),
                f"{row['auto holds']:.3f}",
                *(
                    f"{held:.3f}, {told:.3f}"
                    for held, told in zip(row["held by passes"], row["told by passes"], strict=True)
                ),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
