"""The README's picture: docs/images/how-it-works.png.

    python -m benchmarks.picture

Left: the spectrum of the gradient in every layer of the embedded model, and the rank that LoRA takes of it. Right: the
loss of LoRA and of LoRA-One at each step of the same run.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import lora_one
from lora_one import demo
from lora_one.backends.torch import TorchSession, attach_plain, ops
from lora_one.core.gradient import as_matrix
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import TokenSequence, encode
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.tuners.torch.causal import TorchTuner
from lora_one.finetune.tuners.torch.opening import open_tuner

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "how-it-works.png"
RATE = 3e-3
STEPS = 200


def fresh() -> tuple[TorchTuner, list[TokenSequence]]:
    """The embedded model and its training data."""
    torch.manual_seed(0)
    tuner = open_tuner(demo.MODEL, "float32", None)
    return tuner, [encode(tuner.tokenizer, example) for example in read_examples(demo.TRAIN)]


def spectra() -> list[np.ndarray]:
    """All singular values of the gradient of each layer."""
    tuner, sequences = fresh()
    found: list[np.ndarray] = []
    batches = tuner.batches(sequences[:256], 32)
    with TorchSession(tuner.model, batches, tuner.loss_fn, lora_one.Config(gradient="exact")) as session:
        session.exact_pass(lambda _, g: found.append(np.linalg.svd(ops.to_numpy(as_matrix(ops, g)), compute_uv=False)))
    return found


def losses(spectral: bool) -> list[float]:
    """The loss of each step, from LoRA-One's start or from LoRA's."""
    tuner, sequences = fresh()
    recipe = Recipe(steps=STEPS, learning_rate=RATE, out="runs/benchmark")
    if spectral:
        tuner.model, _ = lora_one.init(tuner.model, tuner.batches(sequences[:256], 32), tuner.loss_fn)
    else:
        tuner.model = attach_plain(tuner.model, recipe.config)
    found: list[float] = []
    tuner.train(sequences, recipe, lambda step, loss: found.append(loss))
    return found


def draw(left: Any, right: Any) -> None:
    """Fill both halves."""
    for s in spectra():
        left.semilogy(np.arange(1, len(s) + 1), s / s[0], color="tab:blue", lw=0.8, alpha=0.5)
    left.axvspan(0.5, 8.5, color="tab:orange", alpha=0.2, lw=0)
    left.text(9.5, 0.6, "what rank 8 takes", color="tab:orange")
    left.set(xlim=(0.5, 64), ylim=(1e-3, 1.1), xlabel="i", ylabel="$S_i / S_1$")
    left.set_title("The gradient has few directions (a line a layer)", fontsize=10)
    for name, color, spectral in (("LoRA", "tab:gray", False), ("LoRA-One", "tab:orange", True)):
        right.plot(np.arange(1, STEPS + 1), losses(spectral), color=color, lw=1.2, label=name)
    right.set(xlabel="step", ylabel="training loss", xlim=(0, 80))
    right.set_title(f"Same data, same rate ({RATE:g}), another start", fontsize=10)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)


def main() -> None:
    """Measure and draw."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    draw(*figure.subplots(1, 2))
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
