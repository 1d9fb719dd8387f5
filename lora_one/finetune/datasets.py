"""Examples from data sets that are read through `datasets`: from the hub, or from a folder in the hub's layout."""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_one.errors import BackendError, DataError

from .data import Example, Pictures, conversation
from .source import Source, columns_of

_THROUGH_TEMPLATE = "leave such rows out, or leave turns out, so that conversations go through the chat template"
_FOR_TEMPLATES = {"tools", "chat_template_kwargs"}  # columns beside a conversation


class Rows:
    """An opened source. Its examples are made while it is iterated over.

    Raises:
        DataError: there is no such data set, split or column.
        BackendError: the package `datasets` is not installed.
    """

    def __init__(self, source: Source):
        self.source = source
        self._rows = load_rows(source.path, source.name, source.split)
        needed = source.columns | ({source.images} if source.images else set())
        missing = sorted(needed - set(self._rows.column_names))
        if missing:
            names = ", ".join(self._rows.column_names)
            raise DataError(f"{source.path}, {source.split}: no columns {', '.join(missing)}; there are {names}")

    def __iter__(self) -> Iterator[Example]:
        source = self.source
        beside = _FOR_TEMPLATES & set(self._rows.column_names) if source.conversation else set()
        texts = self._rows.select_columns(sorted(source.columns | beside))
        for index, row in enumerate(texts):
            if not _is_kept(source, row):
                continue
            where = f"{source.path}, {source.split}, row {index}"
            pictures = partial(load_pictures, self._rows, index, [source.images]) if source.images else None
            if source.conversation and not source.turns:
                row = _without_empty(row)
                yield conversation(row, row.get(source.conversation), where)
                continue
            if source.conversation:
                if row.get("tools"):
                    raise DataError(f"{where}: 'tools' have no place in turns: {_THROUGH_TEMPLATE}")
                yield from _answers(source.turns, row[source.conversation], where, pictures)
                continue
            row = {column: _word(source, column, value, where) for column, value in row.items()}
            completion = _first_match(source.completion_match, (source.completion or "").format(**row))
            if completion is not None:
                yield Example(_prompt(source, row, where), completion, where, pictures, as_written=True)


def load_rows(path: str, name: str | None, split: str) -> Any:
    """Return a split of a data set, a `datasets.Dataset`. Raises the errors of `Rows`."""
    datasets = require("datasets")
    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        kind = "folder" if Path(path).is_dir() else "hub name"
        raise DataError(f"{path} ({kind}), {name or 'default'}, {split}: cannot be read: {error}") from error


def require(package: str) -> ModuleType:
    """Import a package of the extra `recipes`. Raise BackendError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise BackendError(f"this needs the package {error.name!r}: pip install 'lora-one[recipes]'") from error


def load_pictures(rows: Any, index: int, columns: Sequence[str]) -> list[Any]:
    """Return the decoded pictures in some columns of a row: each holds a picture, a list of pictures, or None."""
    row, pictures = rows[index], []
    for column in columns:
        value = row[column]
        pictures += value if isinstance(value, list) else [] if value is None else [value]
    return [picture.convert("RGB") for picture in pictures]


def _is_kept(source: Source, row: Mapping[str, object]) -> bool:
    kept = all(re.search(pattern, str(row[column])) for column, pattern in source.keep.items())
    return kept and not any(re.search(pattern, str(row[column])) for column, pattern in source.drop.items())


def _without_empty(value: Any) -> Any:
    """Return a value without the keys that are None: in a column, each object has the keys of all objects."""
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item is not None}
    return value


def _word(source: Source, column: str, value: object, where: str) -> object:
    if column not in source.words:
        return "" if value is None else value
    words = source.words[column]
    if str(value) not in words:
        raise DataError(f"{where}: {column} must be one of {', '.join(words)}, got {value!r}: drop such rows")
    return words[str(value)]


def _prompt(source: Source, row: Mapping[str, object], where: str) -> str:
    for template in source.prompt:
        if all(row[column] != "" for column in columns_of(template)):
            return template.format(**row)
    raise DataError(f"{where}: no prompt template fits: a column that each of them needs is empty")


def _first_match(pattern: str | None, text: str) -> str | None:
    if pattern is None:
        return text or None
    match = re.search(pattern, text)
    return None if match is None or not match[0] else match[0]


def _answers(
    turns: Mapping[str, str], messages: Sequence[Mapping[str, Any]], where: str, pictures: Pictures | None
) -> Iterator[Example]:
    """Yield an example for each answer of the assistant, with everything before it as the prompt."""
    text = turns.get("start", "")
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in turns:
            raise DataError(f"{where}: turns has no template for the role {role!r}")
        if message.get("tool_calls") or content is None:
            raise DataError(f"{where}: 'tool_calls', or a message without content, fits no turn: {_THROUGH_TEMPLATE}")
        if not isinstance(content, str):  # a list of parts; pictures are put first, wherever they stand
            images = turns.get("image", "") * sum(part["type"] == "image" for part in content)
            content = images + "".join(part["text"] for part in content if part["type"] == "text").strip()
        before, after = turns[role].split("{content}")
        if role == "assistant":
            prompt = (text + before).rstrip(" ")  # the tokenizer adds the space
            yield Example(prompt, content, where, pictures, as_written=True)
        text += before + content + after
