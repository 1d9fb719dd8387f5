"""The embedded model's folder and data, and the data as batches of tokens."""

import json
from pathlib import Path

import numpy as np

_HERE = Path(__file__).resolve().parent

MODEL = _HERE / "model"
TRAIN = _HERE / "data" / "train.jsonl"
TEST = _HERE / "data" / "test.jsonl"


def token_batches(size: int = 32, length: int = 32) -> np.ndarray:
    """Return the embedded training texts as batches of tokens, for a first try of a training loop.

    The texts follow each other, each with its end-of-sequence token, and are cut into rows of equal length. So no row
    is padded, and every token can be learnt. What is left over at the end is dropped. No tokenizer library is needed.

    Args:
        size: the number of rows of a batch.
        length: the number of tokens of a row.

    Returns:
        Tokens, int64, of shape (batches, size, length).

    >>> from lora_one import demo
    >>> demo.token_batches().shape
    (38, 32, 32)
    """
    vocabulary = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    examples = [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()]
    texts = [[*example["prompt"], *example["completion"], "<eos>"] for example in examples]
    tokens = np.array([vocabulary[character] for text in texts for character in text])
    batches = len(tokens) // (size * length)
    return tokens[: batches * size * length].reshape(batches, size, length)
