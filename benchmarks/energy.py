"""How much of the best rank-r gradient does a start hold, by passes, directions and processes?

    python -m benchmarks.energy                 # an hour on one core; goes on where it was stopped
    python -m benchmarks.energy --models sort --out mine.json

For each layer: the share of the energy of the exact truncated SVD that lies in the start's directions, beside the
report's estimate of it, which does not know G. The models are a pretrained encoder on text, by a contrastive loss and
as a classifier of word orders, the embedded Llama and a tiny T5. A start folds in its first pass; "sides alone" is the
start of models whose rows a backend cannot see; of P processes each folds every P-th batch, and they merge.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import harness
from benchmarks.minilm import contrastive_loss, docstring_pairs, load_minilm, pair_batches
from lora_one.backends import load_backend
from lora_one.backends.interface import PassResult
from lora_one.backends.torch import TorchSession, ops
from lora_one.backends.torch.passes.batches import LossFn
from lora_one.config import Config
from lora_one.core.alignment import captured_energy
from lora_one.core.factors import Factors
from lora_one.core.fold import FoldState, merge_folds
from lora_one.core.gradient import as_matrix
from lora_one.passes import Spectra, sketch_gradients
from lora_one.report import share_of_best

RESULT = harness.RESULTS / "energy.json"
RANK = 8
MODELS = ("minilm, contrastive", "minilm", "sort", "t5")  # the last three are tasks of benchmarks.quality
np_ops = load_backend("numpy").ops


class Problem(NamedTuple):
    """A model, and what its start reads."""

    model: torch.nn.Module
    batches: list[Any]
    loss_fn: LossFn
    targets: str


class Way(NamedTuple):
    """How a start is made."""

    passes: int
    rank: int = RANK
    oversample: int = Config().oversample
    folds: bool = True
    processes: int = 1


def ways() -> Iterator[Way]:
    """All that are measured of a model, what matters most first."""
    yield from (Way(1), Way(2), Way(1, processes=4), Way(2, folds=False), Way(2, processes=4))
    for passes in (1, 2):
        yield from (Way(passes, rank=rank) for rank in (4, 32, 64))
        yield from (Way(passes, oversample=oversample) for oversample in (0, 8, 24))
        yield Way(passes, processes=2)
    yield from (Way(3, oversample=oversample) for oversample in (0, 8, 16, 24))
    yield Way(3, folds=False)


def problem(name: str) -> Problem:
    """The model of a name in `MODELS`."""
    if name == "minilm, contrastive":
        encoder, tokenizer = load_minilm()
        return Problem(encoder, pair_batches(tokenizer, docstring_pairs(64), 16), contrastive_loss, "all-linear")
    from benchmarks.quality.tasks import TASKS

    task = TASKS[name]()
    return Problem(task.model(), task.start_batches(0), task.loss_fn, task.targets)


class _Session(TorchSession):
    """A session that cannot fold, or that folds as several processes would."""

    def __init__(self, given: Problem, config: Config, way: Way):
        super().__init__(copy.deepcopy(given.model), given.batches, given.loss_fn, config)
        self._way = way
        self._problem = given

    @property
    def folds(self) -> bool:
        return self._way.folds

    def fold_pass(self, states: dict[str, FoldState]) -> tuple[PassResult, dict[str, FoldState | None]]:
        count, given = self._way.processes, self._problem
        if count == 1:
            return super().fold_pass(states)
        found = []
        for number in range(count):
            alone = Way(self._way.passes, self._way.rank, self._way.oversample)
            with _Session(given._replace(batches=given.batches[number::count]), self._config, alone) as session:
                found.append(session.fold_pass(dict(states)))
        merged = found[0][1]
        for _, others in found[1:]:
            merged = {name: _merged(merged[name], others[name]) for name in merged}
        return found[0][0]._replace(loss=float(np.mean([result.loss for result, _ in found]))), merged


def _merged(state: FoldState | None, other: FoldState | None) -> FoldState | None:
    """Of the sum, in the place of the mean: a start knows no scale."""
    return state if other is None else other if state is None else merge_folds(ops, state, other)


def started(given: Problem, way: Way) -> Spectra:
    """The spectra of a start, as `lora_one.init` has them."""
    config = Config(rank=way.rank, oversample=way.oversample, passes=way.passes, targets=given.targets)
    with _Session(given, config, way) as session:
        return sketch_gradients(session, config)


def measured(given: Problem, way: Way, gradients: dict[str, np.ndarray], energies: dict[str, np.ndarray]) -> dict:
    """A row: what the worst and the median layer hold, and what is told of them."""
    began = time.process_time()
    found = started(given, way)
    seconds = time.process_time() - began
    shares, told = {}, {}
    for name, g in gradients.items():
        own = found.layers[name]
        u, vt = (ops.to_numpy(x).astype(np.float64) for x in (own.spectrum.u, own.spectrum.vt))
        shares[name] = float(np.sum((u.T @ g @ vt.T) ** 2) / np.sum(energies[name][: way.rank]))
        told[name] = share_of_best(own.values)
    return {
        **way._asdict(),
        "made": found.passes,
        "worst": min(shares.values()),
        "median": float(np.median(list(shares.values()))),
        "told_worst": min(told.values()),
        "told_too_much": max(told[name] - shares[name] for name in shares),
        "cpu_seconds": seconds,
        "shares": shares,
    }


def exact_gradients(
    model: torch.nn.Module, batches: list, loss_fn: LossFn = contrastive_loss, targets: str = "all-linear"
) -> dict[str, np.ndarray]:
    """G of every target layer that has one, float64 arrays of the float32 gradients, (out, in)."""
    gradients: dict[str, np.ndarray] = {}
    config = Config(gradient="exact", targets=targets)
    session = TorchSession(copy.deepcopy(model), batches, loss_fn, config)
    with session:
        session.exact_pass(lambda name, g: gradients.update({name: ops.to_numpy(as_matrix(ops, g)).astype(np.float64)}))
    return gradients


def shares_of_best(gradients: dict[str, np.ndarray], factors: dict[str, Factors]) -> dict[str, float]:
    """Each layer's energy in the directions of its factors, over the best that their rank can hold."""
    found = {}
    for name, g in gradients.items():
        rank = factors[name].lora_A.shape[0]
        best = np.sum(np.linalg.svd(g, compute_uv=False)[:rank] ** 2)
        found[name] = float(captured_energy(np_ops, g, factors[name])) * float(np.sum(g**2) / best)
    return found


def factors_of(model: torch.nn.Module, name: str) -> Factors:
    """A layer's pair as float64 arrays."""
    layer = model.base_model.model.get_submodule(name)
    pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return Factors(*(ops.to_numpy(x).astype(np.float64) for x in pair))


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    keys = ("model", "passes", "rank", "oversample", "folds", "processes")
    shown = ("worst", "median", "told_worst", "told_too_much")
    return harness.table(
        [*keys, *shown, "CPU s"],
        [[*(row[key] for key in keys), *(f"{row[key]:.4f}" for key in shown), row["cpu_seconds"]] for row in rows],
    )


def main() -> None:
    """Measure, print the tables and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.is_file() else []
    done = {(row["model"], *(row[field] for field in Way._fields)) for row in rows}
    for name in options.models:
        given = problem(name)
        gradients = exact_gradients(*given)
        gradients = {layer: g for layer, g in gradients.items() if g.any()}
        energies = {layer: np.linalg.svd(g, compute_uv=False) ** 2 for layer, g in gradients.items()}
        smallest = min(min(g.shape) for g in gradients.values())
        for way in ways():
            if way.rank > smallest or (name, *way) in done:
                continue
            rows.append({"model": name, "layers": len(gradients), **measured(given, way, gradients, energies)})
            harness.save(options.out, versions=harness.versions("torch", "transformers", "lora-one"), rows=rows)
        print(table([row for row in rows if row["model"] == name]), flush=True)


if __name__ == "__main__":
    main()
