"""Fine-tuning data: JSON Lines files of prompt and completion, or of chat messages, as token sequences."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import DataError

BYTE_ORDER_MARK = "\ufeff"

Messages = list[dict[str, str]]
Pictures = Callable[[], list[Any]]  # reads and decodes them when it is called: a data set of images fills no memory


@dataclass(frozen=True)
class Example:
    """One line of a data file: a prompt and its completion, or a conversation that ends with the assistant.

    Attributes:
        where: file and line, for error messages.
        pictures: what the image tokens in the prompt stand for, in their order.
    """

    prompt: str | Messages
    completion: str
    where: str
    pictures: Pictures | None = None


@dataclass(frozen=True)
class TokenSequence:
    """An example in tokens. The loss is on what comes after the prompt.

    Attributes:
        tokens: prompt, completion and end of sequence.
        prompt_length: how many of them are the prompt.
        pictures: see `Example`; each has one image token in the prompt.
        where: see `Example`.
    """

    tokens: list[int]
    prompt_length: int
    pictures: Pictures | None = None
    where: str = field(default="", compare=False)

    def cut(self, length: int, separate: bool = False) -> "TokenSequence | None":
        """The first `length` tokens, or None if nothing of the completion is among them.

        Args:
            separate: prompt and completion are sequences of their own, as in an encoder-decoder: each is cut.
        """
        if not separate:
            return None if self.prompt_length >= length else replace(self, tokens=self.tokens[:length])
        prompt, completion = self.tokens[: self.prompt_length], self.tokens[self.prompt_length :]
        prompt = prompt[: length - 1]  # the encoder's text is closed by an end-of-sequence token
        return replace(self, tokens=[*prompt, *completion[:length]], prompt_length=len(prompt))


def read_examples(path: str | Path) -> list[Example]:
    """Read a JSON Lines file, or the `train.jsonl` of a folder, which is mlx-lm's layout.

    Each line is an object with "prompt" and "completion" (strings), with "messages" (a list of {"role", "content"}
    whose last is the assistant's), or with "text" (a string, all of which is learnt). Blank lines are skipped.

    Raises:
        DataError: the first line that is neither, with its number and the reason; or a file with no examples.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "train.jsonl"
    examples = [
        _example(line, f"{path.name}, line {number}")
        for number, line in enumerate(_lines(path), start=1)
        if line.strip()
    ]
    if not examples:
        raise DataError(f"{path} must hold at least one example, got none")
    return examples


def _lines(path: Path) -> list[str]:
    """The lines of a file.

    A line of JSON Lines ends at a line feed alone: str.splitlines would also split at characters that may stand in a
    JSON string as they are (U+0085, U+2028, U+2029). A byte-order mark stands before the first line, and, where files
    were put together, before others.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return [line.removeprefix(BYTE_ORDER_MARK) for line in text.split("\n")]


def _example(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or as many brackets
        raise DataError(f"{where}: not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object, got {type(row).__name__}")
    if "messages" in row:
        return _conversation(row["messages"], where)
    if "text" in row and not {"prompt", "completion"} & row.keys():
        if not isinstance(row["text"], str) or not row["text"]:
            raise DataError(f"{where}: 'text' must be a string with something in it, got {row['text']!r:.60}")
        return Example("", row["text"], where)
    missing = [key for key in ("prompt", "completion") if key not in row]
    if missing:
        keys = ", ".join(map(repr, row)) or "no keys"
        raise DataError(f"{where}: must have 'prompt' and 'completion', or 'messages'; got {keys}")
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str):
            raise DataError(f"{where}: {key!r} must be a string, got {type(row[key]).__name__}")
    if not row["completion"]:
        raise DataError(f"{where}: 'completion' is empty: there is nothing to learn")
    return Example(row["prompt"], row["completion"], where)


def _conversation(messages: Any, where: str) -> Example:
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: 'messages' must be a list of at least two, got {messages!r:.60}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"{where}: a message must have the strings 'role' and 'content', got {message!r:.60}")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's, got {messages[-1]['role']!r}")
    return Example(messages[:-1], messages[-1]["content"], where)


def encode(tokenizer: Any, example: Example) -> TokenSequence:
    """An example in the tokens of a Hugging Face tokenizer.

    A prompt is followed by its completion and the end-of-sequence token; a conversation goes through the tokenizer's
    chat template.

    Raises:
        DataError: a conversation, and the tokenizer has no chat template, or one that rewrites the prompt.
    """
    prompt = encode_prompt(tokenizer, example)
    if isinstance(example.prompt, str):
        completion = tokenizer.encode(example.completion, add_special_tokens=False)
        return TokenSequence(
            [*prompt, *completion, tokenizer.eos_token_id], len(prompt), example.pictures, example.where
        )
    messages = [*example.prompt, {"role": "assistant", "content": example.completion}]
    tokens = _template(tokenizer, messages, add_generation_prompt=False)
    if tokens[: len(prompt)] != prompt:
        raise DataError(
            f"{example.where}: the tokenizer's chat template must render a conversation as the prompt followed by the "
            "answer, but it changes the prompt once the answer is there: use prompt/completion lines instead"
        )
    if len(tokens) == len(prompt):
        raise DataError(f"{example.where}: the completion has no tokens")
    return TokenSequence(tokens, len(prompt), example.pictures, example.where)


def encode_prompt(tokenizer: Any, example: Example) -> list[int]:
    """The tokens of the prompt alone, ready for the completion to be generated."""
    if not isinstance(example.prompt, str):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(f"{example.where}: 'messages' need a tokenizer with a chat template, and this one has none")
        return _template(tokenizer, example.prompt, add_generation_prompt=True)
    tokens = list(tokenizer.encode(example.prompt))
    # Some tokenizers close every text with an end-of-sequence token; the completion is still to come.
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens


def _template(tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
        )
    )
