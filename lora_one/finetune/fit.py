"""Whether data, tokenizer and model fit together: found out before the work, by line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.errors import DataError, ModelError

from .data import TokenSequence


@dataclass(frozen=True)
class Limits:
    """What a model can be given. None: no limit.

    Attributes:
        rows: of the embedding. Token ids are below.
        positions: tokens of a sequence that the model has a place for; in an encoder-decoder of the encoder's text.
        answer_positions: of the decoder's text, in an encoder-decoder.
        trained: tokens of a sequence that the model was made for. It runs on longer ones, but has seen none.
    """

    rows: int | None = None
    positions: int | None = None
    answer_positions: int | None = None
    trained: int | None = None


def check_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Raises ModelError where no completion could be closed, and no answer would end."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer must have an end-of-sequence token, with which a completion ends, got none: name "
            'one of its tokens as "eos_token" in tokenizer_config.json'
        )


def pad_token(tokenizer: Any, rows: int | None) -> int:
    """What fills a batch up. Its value is never looked at, but it must have a row: tokens added for padding have none
    where the model was not resized.
    """
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None or (rows is not None and pad >= rows) else pad)


def check_sequences(sequences: Sequence[TokenSequence], tokenizer: Any, limits: Limits, separate: bool) -> str | None:
    """Whether a model can be given these sequences.

    Args:
        separate: of an encoder-decoder: see `TokenSequence.cut`.

    Returns:
        What a person should know though it works, or None.

    Raises:
        DataError: a token that the model has no row for, or a sequence that is too long for it.
    """
    for sequence in sequences:
        _check_tokens(sequence, tokenizer, limits)
        if separate:
            encoded = sequence.prompt_length + 1  # closed by an end-of-sequence token
            _check_length(sequence.where, "the prompt", encoded, limits.positions)
            answer = len(sequence.tokens) - sequence.prompt_length
            _check_length(sequence.where, "the completion", answer, limits.answer_positions)
        else:
            _check_length(sequence.where, "the sequence", len(sequence.tokens), limits.positions)
    if limits.trained is None or separate:
        return None
    longer = [sequence for sequence in sequences if len(sequence.tokens) > limits.trained]
    if not longer:
        return None
    longest = max(longer, key=lambda sequence: len(sequence.tokens))
    return (
        f"{len(longer)} of {len(sequences)} sequences are longer than the {limits.trained} tokens that the model was "
        f"made for; the longest is {longest.where} with {len(longest.tokens)}: max_length cuts them"
    )


def check_questions(questions: Sequence[TokenSequence], tokenizer: Any, limits: Limits, separate: bool) -> None:
    """Whether a model can answer these prompts, with as many tokens as the longest of the answers has.

    Raises:
        DataError: see `check_sequences`.
    """
    longest = max((len(question.tokens) - question.prompt_length for question in questions), default=0)
    for question in questions:
        _check_tokens(question, tokenizer, limits)
        prompt = question.prompt_length
        if separate:
            _check_question(question.where, prompt + 1, limits.positions)
            _check_question(question.where, longest + 1, limits.answer_positions)
        else:
            _check_question(question.where, prompt + longest, limits.positions)


def _check_tokens(sequence: TokenSequence, tokenizer: Any, limits: Limits) -> None:
    largest = max(sequence.tokens)
    if limits.rows is None or largest < limits.rows:
        return
    size = len(tokenizer)
    raise DataError(
        f"{sequence.where}: token {largest} ({tokenizer.decode([largest])!r}) is not one of the model's {limits.rows}: "
        f"the tokenizer has {size}; use the tokenizer that belongs to this model, or give the model their rows "
        f"(transformers: model.resize_token_embeddings({size})) and train them"
    )


def _check_length(where: str, what: str, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise DataError(
            f"{where}: {what} must be at most {limit} tokens long, the positions that the model has, got {length}: "
            f"max_length {limit} (on the command line --max-length {limit}), or less, cuts it"
        )


def _check_question(where: str, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise DataError(
            f"{where}: the prompt and the longest answer must have at most {limit} tokens, the positions that the "
            f"model has, got {length}: leave this item out of the test items, or shorten it"
        )
