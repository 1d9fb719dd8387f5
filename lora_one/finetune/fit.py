"""Checks, before any work, that data, tokenizer and model fit together. Messages name the line of the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_one.errors import DataError, ModelError

from .encoding import TokenSequence
from .template import Tokenizer


@dataclass(frozen=True)
class Limits:
    """What a model accepts. None means that there is no limit.

    Attributes:
        rows: rows of the embedding; token ids must be below this number.
        positions: the longest sequence, in tokens, that the model has positions for; in an encoder-decoder, the
            longest text of the encoder.
        answer_positions: the longest text of the decoder in an encoder-decoder, in tokens.
        trained: the longest sequence that the model was trained on, in tokens. It runs on longer ones.
    """

    rows: int | None = None
    positions: int | None = None
    answer_positions: int | None = None
    trained: int | None = None


def check_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Raise ModelError if the tokenizer has no end-of-sequence token: no completion could end."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer must have an end-of-sequence token, with which a completion ends, got none: name "
            'one of its tokens as "eos_token" in tokenizer_config.json'
        )


def pad_token(tokenizer: Tokenizer, rows: int | None) -> int:
    """Return the token that fills up a batch.

    Its value does not matter, since it is masked, but the embedding must have a row for it. A padding token that was
    added to the tokenizer has none if the model was not resized; then it is the end-of-sequence token.
    """
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None or (rows is not None and pad >= rows) else pad)


def check_sequences(
    sequences: Sequence[TokenSequence], tokenizer: Tokenizer, limits: Limits, separate: bool
) -> str | None:
    """Check that a model accepts these training sequences.

    Args:
        separate: the model is an encoder-decoder; see `TokenSequence.cut`.

    Returns:
        A remark for the user about something that works but may surprise, or None.

    Raises:
        DataError: the model has no row for a token, or a sequence is too long for it.
    """
    for sequence in sequences:
        _check_tokens(sequence, tokenizer, limits)
        if separate:
            encoder_length = sequence.prompt_length + 1  # with an end-of-sequence token
            _check_length(sequence.where, "the prompt", encoder_length, limits.positions)
            answer_length = len(sequence.tokens) - sequence.prompt_length
            _check_length(sequence.where, "the completion", answer_length, limits.answer_positions)
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


def check_questions(questions: Sequence[TokenSequence], tokenizer: Tokenizer, limits: Limits, separate: bool) -> None:
    """Check that a model can answer these prompts with as many tokens as the longest expected answer has.

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


def _check_tokens(sequence: TokenSequence, tokenizer: Tokenizer, limits: Limits) -> None:
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
