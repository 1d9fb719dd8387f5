"""Data sets read through `datasets`: from the hub, or from a local folder in the hub's layout."""

import dataclasses
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import Formatter
from types import ModuleType
from typing import Any

from lora_one.checks import check_integer, check_text, check_texts
from lora_one.errors import BackendError, ConfigError, DataError
from lora_one.files.settings import parsed

from .data import Example

_AS_JSON_LINES = "leave such rows out, or write them as JSON Lines with 'messages', which go through the chat template"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where examples come from, and how a row becomes one.

    Attributes:
        path: a name on the hub, or a folder in its layout (parquet, JSON Lines or CSV files, with or without a
            README that lists configurations). A folder of that name in the working directory comes first.
        name: the data set's configuration.
        split: for instance "train", or "train[:1000]".
        keep, drop: column -> regular expression: rows are left out where one of `keep` is not found, or one of `drop`.
        words: column -> value -> the word that stands for it in the templates, for labels.
        prompt: a template with {columns}; of several, the first whose columns all have something in them.
        completion: a template with {columns}; rows where nothing comes of it are left out.
        completion_match: a regular expression: what it finds first in the completion is the completion. A row in which
            it finds nothing is left out.
        conversation: the column of a conversation, instead of prompt and completion: a list of messages with "role"
            and "content". Each answer of the assistant's is an example of its own, all before it the prompt.
        turns: role -> template with {content}, of a conversation; "start" goes before it, "image" stands for a picture.
        images: the column of a picture, or of a list of them.
        max_tokens: sequences of so many tokens or more are left out.
        max_examples: reading stops after so many.
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
            raise ConfigError(f"{self.path}: give either prompt and completion, or conversation and turns")
        unfit = [
            role for role, text in self.turns.items() if role not in ("start", "image") and "{content}" not in text
        ]
        if unfit or (self.conversation is not None and "assistant" not in self.turns):
            raise ConfigError("turns must have a template with {content} for each role and for the assistant")

    @property
    def columns(self) -> set[str]:
        """The columns that the text is made of."""
        templates = [*self.prompt, self.completion or ""]
        found = {_column(name) for text in templates for _, name, _, _ in Formatter().parse(text) if name is not None}
        return found | {*self.keep, *self.drop, *self.words} | ({self.conversation} if self.conversation else set())


def make_source(values: Mapping[str, Any], where: str) -> Source:
    """A `Source` from a configuration file's settings.

    Raises:
        ConfigError: a setting that does not exist, or one that cannot be.
    """
    known = {field.name for field in dataclasses.fields(Source)}
    unknown = sorted(map(str, set(values) - known))
    if unknown:
        raise ConfigError(f"{where}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        return Source(**parsed(Source, values))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: a setting has the wrong type: {error}") from error


class Rows:
    """A source that has been opened: its examples, made while it is iterated over.

    Raises:
        DataError: no such data set, split or column.
        BackendError: the package `datasets` is not installed.
    """

    def __init__(self, source: Source):
        self.source = source
        self._rows = load_rows(source.path, source.name, source.split)
        wanted = source.columns | ({source.images} if source.images else set())
        missing = sorted(wanted - set(self._rows.column_names))
        if missing:
            found = ", ".join(self._rows.column_names)
            raise DataError(f"{source.path}, {source.split}: no columns {', '.join(missing)}; there are {found}")

    def __iter__(self) -> Iterator[Example]:
        source = self.source
        tools = {"tools"} & set(self._rows.column_names) if source.conversation else set()
        texts = self._rows.select_columns(sorted(source.columns | tools))
        for index, row in enumerate(texts):
            where = f"{source.path}, {source.split}, row {index}"
            kept = all(re.search(pattern, str(row[column])) for column, pattern in source.keep.items())
            if not kept or any(re.search(pattern, str(row[column])) for column, pattern in source.drop.items()):
                continue
            pictures = partial(load_pictures, self._rows, index, source.images) if source.images else None
            if source.conversation:
                if row.get("tools"):
                    raise DataError(f"{where}: 'tools' have no place in turns: {_AS_JSON_LINES}")
                yield from _answers(source.turns, row[source.conversation], where, pictures)
                continue
            row = {column: _word(source, column, value, where) for column, value in row.items()}
            completion = _first_match(source.completion_match, (source.completion or "").format(**row))
            if completion is not None:
                yield Example(_prompt(source, row, where), completion, where, pictures)


def load_rows(path: str, name: str | None, split: str) -> Any:
    """A split of a data set, as `datasets.Dataset`. Raises as `Rows`."""
    datasets = require("datasets")
    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        kind = "folder" if Path(path).is_dir() else "hub name"
        raise DataError(f"{path} ({kind}), {name or 'default'}, {split}: cannot be read: {error}") from error


def require(package: str) -> ModuleType:
    """A package of the extra `recipes`. Raises BackendError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise BackendError(f"this needs the package {error.name!r}: pip install 'lora-one[recipes]'") from error


def load_pictures(rows: Any, index: int, column: str) -> list[Any]:
    """The pictures of a row, decoded."""
    value = rows[index][column]
    pictures = value if isinstance(value, list) else [] if value is None else [value]
    return [picture.convert("RGB") for picture in pictures]


def _column(field_name: str) -> str:
    return re.split(r"[.\[]", field_name)[0]


def _word(source: Source, column: str, value: Any, where: str) -> Any:
    if column not in source.words:
        return "" if value is None else value
    words = source.words[column]
    if str(value) not in words:
        raise DataError(f"{where}: {column} must be one of {', '.join(words)}, got {value!r}: drop such rows")
    return words[str(value)]


def _prompt(source: Source, row: dict[str, Any], where: str) -> str:
    for template in source.prompt:
        columns = [_column(name) for _, name, _, _ in Formatter().parse(template) if name is not None]
        if all(row[column] != "" for column in columns):
            return template.format(**row)
    raise DataError(f"{where}: no prompt template fits: a column that each of them needs is empty")


def _first_match(pattern: str | None, text: str) -> str | None:
    if pattern is None:
        return text or None
    match = re.search(pattern, text)
    return None if match is None or not match[0] else match[0]


def _answers(turns: Mapping[str, str], messages: Any, where: str, pictures: Any) -> Iterator[Example]:
    text = turns.get("start", "")
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in turns:
            raise DataError(f"{where}: turns has no template for the role {role!r}")
        if message.get("tool_calls") or content is None:
            raise DataError(f"{where}: 'tool_calls', or a message without content, fits no turn: {_AS_JSON_LINES}")
        if not isinstance(content, str):  # parts; pictures come first, wherever they are
            seen = turns.get("image", "") * sum(part["type"] == "image" for part in content)
            content = seen + "".join(part["text"] for part in content if part["type"] == "text").strip()
        before, after = turns[role].split("{content}")
        if role == "assistant":
            yield Example((text + before).rstrip(" "), content, where, pictures)  # the tokenizer adds the blank
        text += before + content + after
