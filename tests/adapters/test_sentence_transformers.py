"""The script for sentence-transformers: embeddings get better, and both folders that it wrote keep them."""

import runpy
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

import lora_one
from lora_one import demo
from lora_one.finetune import read_examples

SCRIPT = Path(__file__).parents[2] / "adapters" / "sentence_transformers" / "finetune.py"


def test_a_reload_of_either_folder_has_the_trained_embeddings(tmp_path, monkeypatch):
    minilm = runpy.run_path(str(SCRIPT))["minilm"]()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--steps", "20", "--batch-size", "16", "--out", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    examples = read_examples(demo.TEST)[:128]

    def embeddings(model: SentenceTransformer) -> tuple[np.ndarray, np.ndarray]:
        return model.encode([x.prompt for x in examples]), model.encode([x.completion for x in examples])

    def found(pairs: tuple[np.ndarray, np.ndarray]) -> float:
        return float((np.argmax(pairs[0] @ pairs[1].T, axis=1) == np.arange(len(examples))).mean())

    base = SentenceTransformer(minilm)
    before = embeddings(base)
    lora_one.load(base[0].model, tmp_path / "adapter")  # PEFT puts its layers into the model itself
    adapted = embeddings(base)
    assert found(adapted) > found(before) + 0.15
    whole = embeddings(SentenceTransformer(str(tmp_path / "model")))
    np.testing.assert_allclose(whole, adapted, rtol=0, atol=1e-5)
    assert np.abs(whole[0] - before[0]).max() > 0.05
