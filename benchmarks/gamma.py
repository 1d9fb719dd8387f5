"""Does the paper's gamma = 128 fit, and what does gamma="auto" choose?

    python -m benchmarks.gamma

Loss on the init batches and on held-out data right after the start, before any training, over a grid of gammas: the
embedded Llama on its two tasks, and the pretrained MiniLM encoder on docstrings, contrastively and as a classifier by
module whose head was fitted first.
"""

import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_one
from benchmarks.minilm import (
    Classifier,
    contrastive_loss,
    docstring_pairs,
    load_minilm,
    module_docstrings,
    pair_batches,
)
from lora_one import demo
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import encode
from lora_one.finetune.tuners.torch.opening import open_tuner

GAMMAS: tuple[float, ...] = (8.0, 32.0, 128.0, 512.0, 2048.0, 8192.0)
RESULT = Path(__file__).parent / "results" / "gamma.json"
LossFn = Callable[[nn.Module, Any], torch.Tensor]


def demo_case(folder: Path) -> tuple[nn.Module, list[Any], list[Any], LossFn, Any]:
    """The embedded Llama on one of its tasks."""
    tuner = open_tuner(demo.MODEL, "float32", None)
    train, test = (
        [encode(tuner.tokenizer, e) for e in read_examples(folder / f"{s}.jsonl")] for s in ("train", "test")
    )
    return tuner.model, tuner.batches(train[:256], 32), tuner.batches(test, 32), tuner.loss_fn, "all-linear"


def contrastive_case() -> tuple[nn.Module, list[Any], list[Any], LossFn, Any]:
    """MiniLM as it was pretrained."""
    model, tokenizer = load_minilm()
    batches = pair_batches(tokenizer, docstring_pairs(192), 16)
    return model, batches[:4], batches[4:], contrastive_loss, "all-linear"


def classifier_case() -> tuple[nn.Module, list[Any], list[Any], LossFn, Any]:
    """MiniLM telling which module of the standard library a docstring is from, its head fitted first."""
    encoder, tokenizer = load_minilm()
    texts = module_docstrings(640)
    names = [name for name, _ in Counter(name for name, _ in texts).most_common(16)]
    texts = [(name, text) for name, text in texts if name in names]
    batches = []
    for i in range(0, len(texts) - 15, 16):
        part = texts[i : i + 16]
        tokens = tokenizer([t for _, t in part], return_tensors="pt", padding=True, truncation=True, max_length=48)
        batches.append((dict(tokens), torch.tensor([names.index(name) for name, _ in part])))
    model = Classifier(encoder, len(names))
    half = len(batches) // 2
    model.fit_head(batches[:half])

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return model, batches[:4], batches[half:], loss_fn, r"encoder\.encoder\..*\.(query|key|value|dense)"


CASES: dict[str, Callable[[], tuple[nn.Module, list[Any], list[Any], LossFn, Any]]] = {
    "demo main": lambda: demo_case(demo.TRAIN.parent),
    "demo harder": lambda: demo_case(demo.TRAIN.parent / "harder"),
    "minilm contrastive": contrastive_case,
    "minilm classifier": classifier_case,
}


def mean_loss(model: nn.Module, batches: list[Any], loss_fn: LossFn) -> float:
    """Mean over the batches, without dropout."""
    model.eval()
    with torch.no_grad():
        return sum(float(loss_fn(model, batch)) for batch in batches) / len(batches)


def main() -> None:
    """Measure, print, and write benchmarks/results/gamma.json."""
    results: dict[str, Any] = {}
    for name, make in CASES.items():
        base, batches, held_out, loss_fn, targets = make()
        rows = {"base": {"init": mean_loss(base, batches, loss_fn), "held_out": mean_loss(base, held_out, loss_fn)}}
        gammas: list[Any] = [*GAMMAS, "auto"]
        for gamma in gammas:
            config = lora_one.Config(gamma=gamma, targets=targets)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, report = lora_one.init(copy.deepcopy(base), batches, loss_fn, config)
            label = f"auto ({report.gamma:g})" if gamma == "auto" else f"{gamma:g}"
            rows[label] = {"init": mean_loss(model, batches, loss_fn), "held_out": mean_loss(model, held_out, loss_fn)}
        results[name] = rows
        print(name)
        for label, losses in rows.items():
            print(f"  {label:>14}  init {losses['init']:8.4f}   held out {losses['held_out']:8.4f}", flush=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
