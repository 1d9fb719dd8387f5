"""The embedded demo: a tiny pretrained Llama and a fine-tuning task that it cannot do yet.

`MODEL` is a model folder in Hugging Face's format. `TRAIN` and `TEST` are JSON Lines files with the keys `prompt` and
`completion`. All of them come with the package; nothing is downloaded.

    >>> from lora_one.demo import MODEL, TRAIN
    >>> (MODEL / "config.json").exists(), TRAIN.suffix
    (True, '.jsonl')
"""

from .tokens import MODEL, TEST, TRAIN, token_batches

__all__ = ["MODEL", "TEST", "TRAIN", "token_batches"]
