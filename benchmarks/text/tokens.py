"""A byte-level BPE, and items in its tokens."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_one.finetune.encoding import TokenSequence

from .sizes import Size

END = "<|end|>"
SAMPLE = 20_000_000  # bytes that the tokenizer learns from
ASK = '\n"""'  # after the code, before its summary


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> str:
    """A tokenizer that has learnt from the first of these texts; any bytes have tokens, and come back from them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    return str(tokenizer.to_str())


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = SAMPLE
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text


def stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All texts in one row, each ended: uint16."""
    end = tokenizer.token_to_id(END)
    parts = []
    for i in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch(texts[i : i + 256]):
            parts.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(parts)


def cpp_items(tokenizer: Tokenizer, texts: Sequence[str], size: Size, most: int) -> list[TokenSequence]:
    """Windows of whole length, from files in turn; every token but the first counts."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    found: list[TokenSequence] = []
    for start in range(0, max(map(len, rows), default=0), size.window):
        windows = (row[start : start + size.window] for row in rows)
        found += [TokenSequence(window, 1) for window in windows if len(window) == size.window]
    return found[:most]


def summary_items(tokenizer: Tokenizer, pairs: Sequence[Sequence[str]], size: Size, most: int) -> list[TokenSequence]:
    """A function, cut where its summary needs the room; the summary and the end count."""
    ask, end = tokenizer.encode(ASK).ids, tokenizer.encode(END).ids
    codes = tokenizer.encode_batch([code for code, _ in pairs])
    found = []
    for code, summary in zip(codes, tokenizer.encode_batch([summary for _, summary in pairs]), strict=True):
        room = size.window - len(ask) - len(summary.ids) - len(end)
        if room > 0:
            prompt = code.ids[:room] + ask
            found.append(TokenSequence([*prompt, *summary.ids, *end], len(prompt)))
    return found[:most]
