"""The embedded demo: a tiny pretrained Llama and a fine-tuning task that it cannot do yet.

`MODEL` is a model folder in Hugging Face's format. `TRAIN` and `TEST` are JSON Lines files with the keys `prompt` and
`completion`. All of them come with the package; nothing is downloaded.

    >>> from lora_one.demo import MODEL, TRAIN
    >>> (MODEL / "config.json").exists(), TRAIN.suffix
    (True, '.jsonl')
"""

import json
from pathlib import Path

import numpy as np

_HERE = Path(__file__).resolve().parent

MODEL = _HERE / "model"
TRAIN = _HERE / "data" / "train.jsonl"
TEST = _HERE / "data" / "test.jsonl"

__all__ = ["MODEL", "TEST", "TRAIN", "token_batches"]


def token_batches(size: int = 32, length: int = 32) -> np.ndarray:
    """Return the embedded training texts as batches of tokens, for a first try of a training loop.

    The texts follow each other, each with its end-of-sequence token, and are cut into rows of equal length. So no row
    is padded, and every token can be learnt. What is left over at the end is dropped. No tokenizer library is needed.

    Args:
        size: the number of rows of a batch.
        length: the number of tokens of a row.

    Returns:
        Tokens, int64, of shape (batches, size, length).

    >>> token_batches().shape
    (38, 32, 32)
    """
    vocabulary = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    examples = [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()]
    texts = [[*example["prompt"], *example["completion"], "<eos>"] for example in examples]
    tokens = np.array([vocabulary[character] for text in texts for character in text])
    batches = len(tokens) // (size * length)
    return tokens[: batches * size * length].reshape(batches, size, length)
