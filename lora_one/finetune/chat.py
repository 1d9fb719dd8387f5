"""Conversations as rows of a data file have them, in the form that chat templates read: Hugging Face's."""

import json
from typing import Any

from lora_one.errors import DataError

Message = dict[str, Any]

# What a row's "chat_template_kwargs" may not say, since it is said already, or is another row's or tokenizer's.
_TAKEN = {"conversation", "tools", "tokenize", "return_dict", "add_generation_prompt", "continue_final_message"}
_TAKEN |= {"chat_template", "return_tensors", "padding", "truncation", "max_length", "return_assistant_tokens_mask"}


def read_messages(messages: Any, where: str) -> list[Message]:
    """The messages of a conversation that ends with the assistant's.

    "content" is text, or a list of text parts, which are put together; it may be missing where there are "tool_calls".
    The arguments of these become objects where they are JSON in a string, as OpenAI writes them: templates write them
    as JSON themselves. Whatever else a message has goes to the template as it is.

    Raises:
        DataError: a message of another form.
    """
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: 'messages' must be a list of at least two, got {messages!r:.60}")
    found = [_message(message, where) for message in messages]
    if found[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's, got {found[-1]['role']!r}")
    return found


def read_tools(tools: Any, where: str) -> list[dict[str, Any]]:
    """The tools of a row: a list of schemas, or such a list as JSON in a string, as data sets in columns have it.

    Raises:
        DataError: anything else.
    """
    given = _json(tools) if isinstance(tools, str) else tools
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise DataError(f"{where}: 'tools' must be a list of schemas (objects), got {tools!r:.60}")
    return given


def read_settings(settings: Any, where: str) -> dict[str, Any]:
    """A row's "chat_template_kwargs", for instance {"enable_thinking": false}.

    Raises:
        DataError: no object, or a setting that is not the row's to make.
    """
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise DataError(f"{where}: 'chat_template_kwargs' must be an object, got {settings!r:.60}")
    taken = sorted(_TAKEN & settings.keys())
    if taken:
        raise DataError(f"{where}: 'chat_template_kwargs' must leave {', '.join(taken)} to lora-one")
    return settings


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: a message must have the strings 'role' and 'content', got {message!r:.60}")
    found = dict(message)
    if found.get("tool_calls"):
        found["tool_calls"] = _calls(found["tool_calls"], where)
        if found.get("content") is None:
            found["content"] = ""
    elif found.get("content") is None:
        raise DataError(
            f"{where}: a message must have the strings 'role' and 'content', or 'tool_calls', got {message!r:.60}"
        )
    else:
        found.pop("tool_calls", None)  # none: columns write it so
    found["content"] = _text(found["content"], where)
    return found


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise DataError(
            f"{where}: 'content' must be a string or a list of text parts, got {content!r:.60}: pictures are read from "
            "a data source of a configuration file"
        )
    return "".join(part["text"] for part in parts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}: 'tool_calls' must be a list of objects, got {calls!r:.60}")
    return [_call(call, where) for call in calls]


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call must have a 'function' with a 'name', got {call!r:.60}")
    if isinstance(function.get("arguments"), str):
        function = {**function, "arguments": _json(function["arguments"] or "{}")}
    if not isinstance(function.get("arguments", {}), dict):
        raise DataError(
            f"{where}: the 'arguments' of a tool call must be an object, or one as JSON in a string, got {call!r:.90}"
        )
    return {**call, "function": function} if "function" in call else function


def _json(text: str) -> Any:
    """What a string holds as JSON; the string itself where it holds none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
