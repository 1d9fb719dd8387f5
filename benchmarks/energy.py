"""How much of the best rank-r gradient does the sketch capture, by passes and oversampling?

    python -m benchmarks.energy

On a real pretrained encoder with real text: for each layer, the share of the energy of the exact truncated SVD that
lies in the sketch's factors, beside the report's estimate of it, which does not know G.
"""

import copy
import json
import platform
import warnings
from pathlib import Path

import numpy as np
import torch

import lora_one
from benchmarks.minilm import contrastive_loss, docstring_pairs, load_minilm, pair_batches
from lora_one.backends.torch import TorchSession, ops
from lora_one.backends.torch.passes.batches import LossFn
from lora_one.core.alignment import captured_energy
from lora_one.core.factors import Factors
from lora_one.core.gradient import as_matrix

PASSES = (2, 3, 4, 5)
OVERSAMPLE = (0, 8, 16, 24)
RANK = 8
RESULT = Path(__file__).parent / "results" / "energy_minilm.json"


def main() -> None:
    """Measure the grid, print it, and write it to benchmarks/results/."""
    base, tokenizer = load_minilm()
    batches = pair_batches(tokenizer, docstring_pairs(64), 16)
    gradients = exact_gradients(base, batches)

    rows = []
    print("passes   k    worst  median   told, worst its error  seconds")
    for passes in PASSES:
        for oversample in OVERSAMPLE:
            config = lora_one.Config(rank=RANK, passes=passes, oversample=oversample)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the pooler is not part of the loss
                model, report = lora_one.init(copy.deepcopy(base), batches, contrastive_loss, config)
            shares = list(shares_of_best(gradients, {name: factors_of(model, name) for name in gradients}).values())
            told = [layer for layer in report.layers if layer.name in gradients]
            estimates = [layer.share_of_best for layer in told]
            errors = [abs(estimate - share) for estimate, share in zip(estimates, shares, strict=True)]
            rows.append(
                {
                    "passes": passes,
                    "oversample": oversample,
                    "k": RANK + oversample,
                    "worst": min(shares),
                    "median": float(np.median(shares)),
                    "estimate_worst": min(estimates),
                    "estimate_largest_error": max(errors),
                    "seconds": report.seconds,
                    "shares": dict(zip(gradients, shares, strict=True)),
                }
            )
            print(
                f"{passes:>6} {RANK + oversample:>3}  {min(shares):>7.4f} {np.median(shares):>7.4f}   "
                f"{min(estimates):>11.4f} {max(errors):>9.4f}  {report.seconds:>7.2f}"
            )
    machine = {"machine": platform.machine(), "cores": torch.get_num_threads(), "torch": torch.__version__}
    RESULT.write_text(json.dumps({"rank": RANK, "layers": len(gradients), **machine, "rows": rows}, indent=1) + "\n")


def exact_gradients(
    model: torch.nn.Module, batches: list, loss_fn: LossFn = contrastive_loss, targets: str = "all-linear"
) -> dict[str, np.ndarray]:
    """G of every target layer that has one, float64 arrays of the float32 gradients, (out, in)."""
    gradients: dict[str, np.ndarray] = {}
    config = lora_one.Config(gradient="exact", targets=targets)
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


np_ops = lora_one.backends.load_backend("numpy").ops

if __name__ == "__main__":
    main()
