"""Fine-tuning data: JSON Lines files of prompt and completion, or of chat messages, as token sequences."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_one.errors import DataError

from .chat import Message, read_messages, read_tools
from .chat import read_settings as read_template_settings

BYTE_ORDER_MARK = "\ufeff"

Pictures = Callable[[], list[Any]]  # reads and decodes them when it is called: a data set of images fills no memory


@dataclass(frozen=True)
class Example:
    """One line of a data file: a prompt and its completion, or a conversation that ends with the assistant.

    Attributes:
        where: file and line, for error messages.
        pictures: what the image tokens in the prompt stand for, in their order.
        answer: of a conversation, the last message, where it is more than its content: tool calls, reasoning.
        tools: of a conversation: what the assistant may call, for the chat template.
        settings: of a conversation: further variables of the chat template.
    """

    prompt: str | list[Message]
    completion: str
    where: str
    pictures: Pictures | None = None
    answer: Message | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


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
    whose last is the assistant's; see `chat.read_messages`), or with "text" (a string, all of which is learnt). Beside
    "messages" there may be "tools" and "chat_template_kwargs", for the chat template. Other keys, and blank lines, are
    passed over.

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
    _check_unicode(row, line, where)
    if "messages" in row:
        return _conversation(row, where)
    for key in ("tools", "chat_template_kwargs"):
        if row.get(key):
            raise DataError(f"{where}: {key!r} are for the chat template, which only 'messages' go through")
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


def _conversation(row: dict[str, Any], where: str) -> Example:
    if row.get("functions"):
        raise DataError(f"{where}: 'functions' are not read: write them as 'tools'")
    *prompt, answer = read_messages(row["messages"], where)
    return Example(
        prompt,
        answer["content"],
        where,
        answer=answer if answer.keys() - {"role", "content"} else None,
        tools=read_tools(row.get("tools"), where),
        settings=read_template_settings(row.get("chat_template_kwargs"), where),
    )


def _check_unicode(row: dict[str, Any], line: str, where: str) -> None:
    """JSON can write half of a surrogate pair, which no tokenizer takes."""
    if "\\u" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise DataError(f"{where}: {half} is half of a surrogate pair, and no character") from error


def encode(tokenizer: Any, example: Example) -> TokenSequence:
    """An example in the tokens of a Hugging Face tokenizer.

    A prompt is followed by its completion and the end-of-sequence token; a conversation goes through the tokenizer's
    chat template, with its tools.

    Raises:
        DataError: a conversation, and the tokenizer has no chat template, or one that fails on it, makes no use of its
            tools, or rewrites the prompt.
    """
    prompt = encode_prompt(tokenizer, example)
    if isinstance(example.prompt, str):
        completion = tokenizer.encode(example.completion, add_special_tokens=False)
        tokens = [*prompt, *completion, tokenizer.eos_token_id]
        return TokenSequence(tokens, len(prompt), example.pictures, example.where)
    answer = example.answer or {"role": "assistant", "content": example.completion}
    tokens = _template(tokenizer, example, [*example.prompt, answer], add_generation_prompt=False)
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
        return _template_prompt(tokenizer, example, example.prompt)
    tokens = list(tokenizer.encode(example.prompt))
    # Some tokenizers close every text with an end-of-sequence token; the completion is still to come.
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens


def _template_prompt(tokenizer: Any, example: Example, messages: list[Message]) -> list[int]:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(f"{example.where}: 'messages' need a tokenizer with a chat template, and this one has none")
    unknown = [name for name in example.settings if isinstance(template, str) and name not in template]
    if unknown:
        raise DataError(
            f"{example.where}: the tokenizer's chat template makes no use of {', '.join(unknown)}: leave it out of "
            "'chat_template_kwargs'"
        )
    tokens = _template(tokenizer, example, messages, add_generation_prompt=True)
    if example.tools and tokens == _template(tokenizer, replace(example, tools=[]), messages, True):
        raise DataError(
            f"{example.where}: the tokenizer's chat template makes no use of 'tools': leave them out, write them into "
            "a message, or use a tokenizer whose template knows them"
        )
    return tokens


def _template(tokenizer: Any, example: Example, messages: list[Message], add_generation_prompt: bool) -> list[int]:
    settings: dict[str, Any] = {**example.settings, **({"tools": example.tools} if example.tools else {})}
    try:
        return list(
            tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False, **settings
            )
        )
    except Exception as error:  # a template is a program of its own, which refuses a row in any way it likes
        raise DataError(
            f"{example.where}: the tokenizer's chat template fails on this conversation: {type(error).__name__}: "
            f"{error}"
        ) from error
