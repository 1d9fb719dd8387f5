"""The embedded demo: a tiny pretrained Llama and a fine-tuning task that it cannot do yet.

`MODEL` is a model folder in Hugging Face's format. `TRAIN` and `TEST` are JSON Lines files with the keys `prompt` and
`completion`. All of them come with the package; nothing is downloaded.

    >>> from lora_one.demo import MODEL, TRAIN
    >>> (MODEL / "config.json").exists(), TRAIN.suffix
    (True, '.jsonl')
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MODEL = _HERE / "model"
TRAIN = _HERE / "data" / "train.jsonl"
TEST = _HERE / "data" / "test.jsonl"

__all__ = ["MODEL", "TEST", "TRAIN"]
