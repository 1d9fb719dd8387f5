"""Memory of the start on MLX: the peak above the loaded model, beside that of a LoRA training step at rank k.

python -m benchmarks.mlx_init                 # prints the table, writes benchmarks/results/mlx_init.json

Peaks are the allocator's own counts (mx.get_peak_memory) and do not depend on how busy the machine is.
"""

import argparse
import gc
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import default_loss

import lora_one
from lora_one.backends.mlx import attach_plain

RANK, OVERSAMPLE = 8, 16
VOCABULARY = 512
RESULTS = Path(__file__).parent / "results" / "mlx_init.json"
MIB = 2**20


def make_model(quantised: bool) -> nn.Module:
    """A Llama with 6.4M weights in its linear layers."""
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=8,
            num_attention_heads=8,
            vocab_size=VOCABULARY,
            rms_norm_eps=1e-5,
        )
    )
    if quantised:
        nn.quantize(model, group_size=64, bits=4)
    mx.eval(model.parameters())
    return model


def make_batches(count: int, sequences: int, length: int) -> list[tuple[mx.array, mx.array]]:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (count, sequences, length + 1))
    return [(mx.array(part), mx.array([[0, length]] * sequences)) for part in tokens]


def peak_of(quantised: bool, run: Callable[[nn.Module], None]) -> int:
    """Bytes that `run` needs at its peak above the model it is given."""
    gc.collect()  # the model before this one may hang in a cycle
    model = make_model(quantised)
    mx.clear_cache()
    resident = mx.get_active_memory()
    mx.reset_peak_memory()
    run(model)
    return mx.get_peak_memory() - resident


def training_step(batches: list[Any], rank: int) -> Callable[[nn.Module], None]:
    """Two steps of mlx-lm's own LoRA training, Adam's moments included, from the attachment on."""

    def run(model: nn.Module) -> None:
        attach_plain(model, lora_one.Config(rank=rank))
        optimizer = AdamW(1e-4)
        loss_and_gradient = nn.value_and_grad(model, lambda model, batch: default_loss(model, *batch)[0])
        for batch in (batches[0], batches[0]):
            _, gradients = loss_and_gradient(model, batch)
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)

    return run


def init(batches: list[Any], **config: Any) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        lora_one.init(model, batches, config=lora_one.Config(rank=RANK, oversample=OVERSAMPLE, **config))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for quantised in (False, True):
        weights = sum(x.nbytes for _, x in tree_flatten(make_model(quantised).parameters()))
        for sequences, length in ((1, 16), (1, 128), (1, 256)):
            batches = make_batches(2, sequences, length)
            gradients = 8 * 4 * (4 * 256 * 256 + 3 * 256 * 704)
            step = peak_of(quantised, training_step(batches, RANK + OVERSAMPLE))
            row = {
                "base": "4-bit, group 64" if quantised else "float32",
                "tokens": sequences * length,
                "model_mib": weights / MIB,
                "all_gradients_mib": gradients / MIB,
                "training_step_mib": step / MIB,
                "one_pass_mib": peak_of(quantised, init(batches)) / MIB,
                "two_passes_mib": peak_of(quantised, init(batches, passes=2)) / MIB,
                "exact_one_batch_mib": peak_of(quantised, init(batches[:1], gradient="exact")) / MIB,
                "exact_two_batches_mib": peak_of(quantised, init(batches, gradient="exact")) / MIB,
            }
            row["one_pass_over_training_step"] = row["one_pass_mib"] / row["training_step_mib"]
            rows.append(row)
            print(", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    result = {
        "what": f"peak above the loaded model; r = {RANK}, k = {RANK + OVERSAMPLE}, 2 batches",
        "versions": {"mlx": mx.__version__, "mlx-lm": mlx_lm.__version__, "lora-one": lora_one.__version__},
        "device": f"{mx.default_device()}, {platform.system()} {platform.machine()}",
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
