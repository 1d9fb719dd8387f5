"""Several examples in one row, so that few tokens of a batch are padding."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_one.errors import ConfigError

from .encoding import TokenSequence


def pack(sequences: Sequence[TokenSequence], length: int) -> list[TokenSequence]:
    """Return rows of at most `length` tokens that hold all sequences: the longest first, each in the fullest row.

    Args:
        sequences: none is longer than `length`.
        length: the tokens of a row.

    Returns:
        The rows, each with the lengths of its sequences.
    """
    rows: list[list[TokenSequence]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for sequence in sorted(sequences, key=lambda sequence: -len(sequence.tokens)):
        size = len(sequence.tokens)
        at = bisect.bisect_left(room, (size, 0))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sequence)
        bisect.insort(room, (left - size, row))
    return [join(row) for row in rows]


def join(sequences: Sequence[TokenSequence]) -> TokenSequence:
    """Return one row of several sequences."""
    first = sequences[0]
    return TokenSequence(
        tokens=[token for sequence in sequences for token in sequence.tokens],
        prompt_length=first.prompt_length,
        where=first.where if len(sequences) == 1 else f"{first.where} and {len(sequences) - 1} more",
        learnt=tuple(counts for sequence in sequences for counts in sequence.mask),
        lengths=tuple(len(sequence.tokens) for sequence in sequences),
    )


# The largest relative change of a loss that rounding explains: a mixture of experts may compute a token in a batch of
# another size when other tokens change, and so with other last bits.
ROUNDING = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}


def check_apart(
    mean_loss: Callable[[Sequence[TokenSequence]], float], rows: Sequence[TokenSequence], dtype: str = "float32"
) -> None:
    """Check on two examples that the model keeps the examples of a row apart.

    The loss of an example must not change with the tokens of the one before it in its row.

    Args:
        mean_loss: the model's loss on a batch of rows.
        rows: the training data; one row with two examples is enough.
        dtype: the dtype of the model's weights.

    Raises:
        ConfigError: the model does not.
    """
    row = next((row for row in rows if len(row.lengths) > 1), None)
    if row is None:
        return
    start, end = row.lengths[0], row.lengths[0] + row.lengths[1]
    pair = replace(row, tokens=row.tokens[:end], lengths=row.lengths[:2])
    pair = replace(pair, learnt=(False,) * start + row.mask[start:end])
    other = replace(pair, tokens=[*pair.tokens[start - 1 :: -1], *pair.tokens[start:]])
    loss, changed = mean_loss([pair]), mean_loss([other])
    if abs(changed - loss) > ROUNDING[dtype] * loss:
        raise ConfigError(
            "packing needs a model in which the examples of a row cannot see each other, but in this one an example's "
            "loss changes with its neighbour: leave packing out"
        )
