"""The settings of a data source: which rows of a data set become examples, and how."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from lora_one.checks import check_integer, check_text, check_texts
from lora_one.errors import ConfigError
from lora_one.files.settings import parsed


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set that is read through `datasets`, and how its rows become examples.

    Attributes:
        path: a name on the hub, or a folder in the hub's layout (parquet, JSON Lines or CSV files, with or without a
            README that lists configurations). A folder of this name in the working directory comes first.
        name: the configuration of the data set; None is the default one.
        split: for instance "train", or "train[:1000]".
        keep: column -> regular expression. A row is left out if one of them does not match anywhere in its column.
        drop: column -> regular expression. A row is left out if one of them matches somewhere in its column.
        words: column -> value -> the word that replaces the value in the templates, for labels.
        prompt: a template with {columns}, or several: the first whose columns are all filled is used.
        completion: a template with {columns}. Rows that give an empty completion are left out.
        completion_match: a regular expression. Its first match in the completion becomes the completion; rows without
            a match are left out.
        conversation: the column of a conversation, instead of prompt and completion: a list of messages with "role"
            and "content". It goes through the tokenizer's chat template, with the columns "tools" and
            "chat_template_kwargs" if there are any, and all answers of the assistant are learnt.
        turns: role -> template with {content}, to write a conversation without a chat template; "start" goes before the
            first message, and "image" stands for a picture. Each answer of the assistant becomes one example, with all
            messages before it as the prompt.
        images: the column of a picture, or of a list of pictures.
        max_tokens: sequences of this many tokens or more are left out.
        max_examples: reading stops after this many examples.
    """

    path: str
    name: str | None = None
    split: str = "train"
    keep: Mapping[str, str] = field(default_factory=dict)
    drop: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    prompt: Sequence[str] = ()
    completion: str | None = None
    completion_match: str | None = None
    conversation: str | None = None
    turns: Mapping[str, str] = field(default_factory=dict)
    images: str | None = None
    max_tokens: int | None = None
    max_examples: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", (self.prompt,))
        check_texts("prompt", self.prompt)
        for name in ("path", "split", "name", "completion", "completion_match", "conversation", "images"):
            value = getattr(self, name)
            if value is not None or name in ("path", "split"):
                check_text(name, value)
        for name in ("max_tokens", "max_examples"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)
        words = {column: {str(value): word for value, word in of.items()} for column, of in self.words.items()}
        object.__setattr__(self, "words", words)
        for pattern in (*self.keep.values(), *self.drop.values(), self.completion_match or ""):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ConfigError(f"a regular expression is expected, got {pattern!r}: {error}") from error
        if (self.conversation is None) == (not self.prompt or self.completion is None):
            raise ConfigError(f"{self.path}: give either prompt and completion, or conversation")
        unfit = [
            role for role, text in self.turns.items() if role not in ("start", "image") and "{content}" not in text
        ]
        if unfit or (self.turns and "assistant" not in self.turns):
            raise ConfigError("turns must have a template with {content} for each role and for the assistant")
        if self.conversation is not None and self.images is not None and not self.turns:
            raise ConfigError(f"{self.path}: images in a conversation need turns, which say where a picture stands")

    @property
    def columns(self) -> set[str]:
        """The columns that the text of an example, or the choice of its row, depends on."""
        columns = {*self.keep, *self.drop, *self.words}
        for template in (*self.prompt, self.completion or ""):
            columns.update(columns_of(template))
        return columns | ({self.conversation} if self.conversation else set())


def columns_of(template: str) -> list[str]:
    """Return the columns that a template names: {answer.text} and {answer[0]} name "answer"."""
    fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    return [re.split(r"[.\[]", name)[0] for name in fields]


def make_source(values: Mapping[str, Any], where: str) -> Source:
    """Return the `Source` that settings of a configuration file describe.

    Args:
        values: setting -> value.
        where: the name of the setting that holds them, for error messages.

    Raises:
        ConfigError: a setting does not exist, or its value is invalid.
    """
    names = {field.name for field in dataclasses.fields(Source)}
    unknown = sorted(map(str, set(values) - names))
    if unknown:
        raise ConfigError(f"{where}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(names))}")
    try:
        return Source(**parsed(Source, values))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: a setting has the wrong type: {error}") from error
