"""Code that the tuners of all frameworks share."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from lora_one.backends.interface import IGNORED
from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.recipe import Recipe

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


def draw_steps(sequences: Sequence[TokenSequence], recipe: Recipe) -> Iterator[list[list[TokenSequence]]]:
    """Yield the micro-batches of each step, of a recipe's size, number and seed, without end."""
    drawn = draw_batches(sequences, recipe.batch_size, recipe.seed)
    while True:
        yield list(itertools.islice(drawn, recipe.accumulation))


def padded(sequences: Sequence[TokenSequence], width: int, pad: int) -> dict[str, np.ndarray]:
    """Return "input_ids" and "labels", (sequences, width), padded on the right.

    Packed rows have "position_ids" too, from 0 in each example. The padding is one more example in its row.
    """
    tokens = np.full((len(sequences), width), pad, np.int32)
    labels = np.full_like(tokens, IGNORED)
    positions = np.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        length = len(sequence.tokens)
        tokens[row, :length] = sequence.tokens
        labels[row, :length] = sequence.labels
        positions[row] = [*sequence.position_ids, *range(width - length)]
    batch = {"input_ids": tokens, "labels": labels}
    return {**batch, "position_ids": positions} if any(sequence.lengths for sequence in sequences) else batch


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Return the items in groups of `size`; the last group may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def until_end(tokens: list[int], end: int) -> list[int]:
    """Return the tokens before the first `end`, or all of them."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def rounded_up(width: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `width`."""
    return -(-width // multiple) * multiple
