"""Conversations in the rows of a data file, converted to the form that Hugging Face's chat templates read."""

import json
from typing import Any

from lora_one.errors import DataError

Message = dict[str, Any]

# Arguments of `apply_chat_template` that a row must not set: lora-one sets them, or they change more than this row.
_RESERVED_SETTINGS = {
    "conversation", "tools", "tokenize", "return_dict", "add_generation_prompt", "continue_final_message",
    "chat_template", "return_tensors", "padding", "truncation", "max_length", "return_assistant_tokens_mask",
}  # fmt: skip


def read_messages(messages: object, where: str) -> list[Message]:
    """Return the messages of a conversation, the last of which must be the assistant's.

    "content" is text, or a list of text parts, which are joined. It may be missing in a message with "tool_calls".
    If the arguments of a tool call are JSON in a string, as OpenAI writes them, they become objects, because templates
    write them as JSON themselves. All other keys of a message go to the template unchanged.

    Raises:
        DataError: a message has another form.
    """
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: 'messages' must be a list of at least two, got {messages!r:.60}")
    conversation = [_message(message, where) for message in messages]
    if conversation[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's, got {conversation[-1]['role']!r}")
    return conversation


def read_tools(tools: object, where: str) -> list[dict[str, Any]]:
    """Return the tools of a row: a list of schemas, or such a list as JSON in a string, as some data sets store it.

    Raises:
        DataError: "tools" is anything else.
    """
    schemas = _parse_json(tools) if isinstance(tools, str) else tools
    if schemas is None:
        return []
    if not isinstance(schemas, list) or not all(isinstance(schema, dict) for schema in schemas):
        raise DataError(f"{where}: 'tools' must be a list of schemas (objects), got {tools!r:.60}")
    return schemas


def read_template_settings(settings: object, where: str) -> dict[str, Any]:
    """Return a row's "chat_template_kwargs", for instance {"enable_thinking": false}.

    Raises:
        DataError: they are not an object, or set something that only lora-one may set.
    """
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise DataError(f"{where}: 'chat_template_kwargs' must be an object, got {settings!r:.60}")
    reserved = sorted(_RESERVED_SETTINGS & settings.keys())
    if reserved:
        raise DataError(f"{where}: 'chat_template_kwargs' must leave {', '.join(reserved)} to lora-one")
    return settings


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: a message must have the strings 'role' and 'content', got {message!r:.60}")
    fields = dict(message)
    if fields.get("tool_calls"):
        fields["tool_calls"] = _tool_calls(fields["tool_calls"], where)
        if fields.get("content") is None:
            fields["content"] = ""
    elif fields.get("content") is None:
        raise DataError(
            f"{where}: a message must have the strings 'role' and 'content', or 'tool_calls', got {message!r:.60}"
        )
    else:
        fields.pop("tool_calls", None)  # a data set in columns has an empty value in messages without calls
    fields["content"] = _text(fields["content"], where)
    return fields


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [content]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise DataError(
            f"{where}: 'content' must be a string or a list of text parts, got {content!r:.60}: pictures are read from "
            "a data source of a configuration file"
        )
    return "".join(part["text"] for part in parts)


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}: 'tool_calls' must be a list of objects, got {calls!r:.60}")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call must have a 'function' with a 'name', got {call!r:.60}")
    if isinstance(function.get("arguments"), str):
        function = {**function, "arguments": _parse_json(function["arguments"] or "{}")}
    if not isinstance(function.get("arguments", {}), dict):
        raise DataError(
            f"{where}: the 'arguments' of a tool call must be an object, or one as JSON in a string, got {call!r:.90}"
        )
    return {**call, "function": function} if "function" in call else function


def _parse_json(text: str) -> object:
    """Return the value that a JSON text describes, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
