"""Reading of fine-tuning data: JSON Lines files of prompt and completion, of chat messages, or of plain text."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_one.errors import DataError

from .chat import Message, read_messages, read_template_settings, read_tools

BYTE_ORDER_MARK = "\ufeff"

Pictures = Callable[[], list[Any]]  # reads and decodes pictures when called, so that a data set need not be in memory


@dataclass(frozen=True)
class Example:
    """One training example: a prompt and its completion, or a conversation that ends with the assistant's message.

    Attributes:
        prompt: the text before the completion, or the messages before the last one.
        completion: the text to learn; for a conversation, the content of its last message.
        where: the file and line, or the data set and row, for error messages.
        pictures: the pictures that the image tokens in the prompt stand for, in the same order.
        answer: the last message of a conversation, if it holds more than its content: tool calls or reasoning.
        tools: the tools that the assistant may call in a conversation, for the chat template.
        settings: further variables of the chat template, for a conversation.
        context: the number of first messages of a conversation from which nothing is learnt.
        as_written: the prompt is the whole text before the completion: no chat template makes a question of it.
    """

    prompt: str | list[Message]
    completion: str
    where: str
    pictures: Pictures | None = None
    answer: Message | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    context: int = 0
    as_written: bool = False

    @property
    def messages(self) -> list[Message]:
        """The example as a conversation: a prompt is the user's, its completion the assistant's."""
        before = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        return [*before, self.answer or {"role": "assistant", "content": self.completion}]


def read_examples(path: str | Path) -> list[Example]:
    r"""Read a JSON Lines file, or the `train.jsonl` of a folder, which is mlx-lm's layout.

    Use it before `encode`, to write a training loop of your own on the data that `lora-one finetune` reads. Each line
    is an object with one of:

    - "messages": a list of {"role", "content"} whose last message is the assistant's; all of the assistant's messages
      are learnt. "tools" and "chat_template_kwargs" may stand beside it, for the chat template.
    - "prompt" and "completion": two strings, or two lists of such messages; the completion is learnt.
    - "text": a string; all of it is learnt.

    Other keys and blank lines are ignored.

    Args:
        path: the file or the folder.

    Returns:
        The examples in the order of their lines, at least one.

    Raises:
        DataError: a line has none of these forms (the message names the line and the reason), the file has no
            examples, or it cannot be read.

    >>> from pathlib import Path
    >>> file = Path("train.jsonl")
    >>> _ = file.write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n')
    >>> (example,) = read_examples(file)
    >>> example.completion, example.where
    ('2', 'train.jsonl, line 1')
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
    """Return the lines of a JSON Lines file, each without a byte-order mark.

    Only a line feed ends a line. `str.splitlines` would also split at U+0085, U+2028 and U+2029, which may stand in a
    JSON string. A byte-order mark stands before the first line; in a file joined from several, before other lines too.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return [line.removeprefix(BYTE_ORDER_MARK) for line in text.split("\n")]


def _example(line: str, where: str) -> Example:
    row = _object(line, where)
    if "messages" in row:
        return conversation(row, row["messages"], where)
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return conversation(row, row["prompt"] + row["completion"], where, context=len(row["prompt"]))
    for key in ("tools", "chat_template_kwargs"):
        if row.get(key):
            raise DataError(f"{where}: {key!r} are for the chat template, which only messages go through")
    if "text" in row and not {"prompt", "completion"} & row.keys():
        if not isinstance(row["text"], str) or not row["text"]:
            raise DataError(f"{where}: 'text' must be a string with something in it, got {row['text']!r:.60}")
        return Example("", row["text"], where, as_written=True)
    missing = [key for key in ("prompt", "completion") if key not in row]
    if missing:
        keys = ", ".join(map(repr, row)) or "no keys"
        raise DataError(f"{where}: must have 'prompt' and 'completion', or 'messages'; got {keys}")
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str):
            raise DataError(
                f"{where}: {key!r} must be a string (or both lists of messages), got {type(row[key]).__name__}"
            )
    if not row["completion"]:
        raise DataError(f"{where}: 'completion' is empty: there is nothing to learn")
    return Example(row["prompt"], row["completion"], where)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or thousands of brackets
        raise DataError(f"{where}: not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object, got {type(row).__name__}")
    _check_unicode(row, line, where)
    return row


def conversation(row: Mapping[str, Any], messages: object, where: str, context: int = 0) -> Example:
    """Return the example of a row with messages, and with whatever else it has for the chat template.

    Args:
        row: may have "tools" and "chat_template_kwargs".
        messages: the messages.
        where: the file and line, or the data set and row, for error messages.
        context: see `Example`.

    Raises:
        DataError: see `read_messages`, `read_tools` and `read_template_settings`.
    """
    if row.get("functions"):
        raise DataError(f"{where}: 'functions' are not read: write them as 'tools'")
    *prompt, answer = read_messages(messages, where)
    return Example(
        prompt,
        answer["content"],
        where,
        answer=answer if answer.keys() - {"role", "content"} else None,
        tools=read_tools(row.get("tools"), where),
        settings=read_template_settings(row.get("chat_template_kwargs"), where),
        context=context,
    )


def _check_unicode(row: dict[str, Any], line: str, where: str) -> None:
    """Raise DataError for half of a surrogate pair: JSON can write it, but no tokenizer accepts it."""
    if "\\u" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise DataError(f"{where}: {half} is half of a surrogate pair, and no character") from error
