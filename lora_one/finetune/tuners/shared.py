"""Code that the tuners of all frameworks share."""

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from lora_one.finetune.encoding import TokenSequence

T = TypeVar("T")

STATE = "state.safetensors"  # the file of a checkpoint's arrays


def draw_batches(sequences: Sequence[TokenSequence], batch_size: int, seed: int) -> Iterator[list[TokenSequence]]:
    """Yield batches of seeded permutations of the sequences, epoch after epoch, without end."""
    generator = random.Random(seed)
    waiting: list[TokenSequence] = []
    while True:
        while len(waiting) < batch_size:
            waiting += generator.sample(list(sequences), len(sequences))
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Return the items in groups of `size`; the last group may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def until_end(tokens: list[int], end: int) -> list[int]:
    """Return the tokens before the first `end`, or all of them."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def rounded_up(width: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `width`."""
    return -(-width // multiple) * multiple
