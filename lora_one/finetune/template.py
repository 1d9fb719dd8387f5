"""Conversations through a tokenizer's chat template, and which of their tokens the assistant wrote."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

from lora_one.errors import DataError

from .chat import Message
from .data import Example

LossOn = Literal["answers", "last_answer", "everything"]


class Tokenizer(Protocol):
    """What the command needs of a tokenizer: Hugging Face's, or one that passes these members on to it."""

    @property
    def eos_token_id(self) -> int:
        """The token that ends a text. `fit.check_tokenizer` refuses a tokenizer that has none."""
        ...

    @property
    def pad_token_id(self) -> int | None: ...

    def __len__(self) -> int: ...

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, tokens: Sequence[int], /, *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(
        self, messages: list[Message], /, *, tokenize: bool, add_generation_prompt: bool, return_dict: bool, **more: Any
    ) -> Any: ...


def has_template(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_prompt_messages(tokenizer: Tokenizer, example: Example, messages: list[Message]) -> list[int]:
    """Return the tokens of the messages before an answer, ready for the answer to be generated.

    Raises:
        DataError: the tokenizer has no chat template, or one that makes no use of what the row gives it.
    """
    if not has_template(tokenizer):
        raise DataError(f"{example.where}: 'messages' need a tokenizer with a chat template, and this one has none")
    template = getattr(tokenizer, "chat_template", None)
    unused = [name for name in example.settings if isinstance(template, str) and name not in template]
    if unused:
        raise DataError(
            f"{example.where}: the tokenizer's chat template makes no use of {', '.join(unused)}: leave it out of "
            "'chat_template_kwargs'"
        )
    tokens = _render(tokenizer, example, messages, add_generation_prompt=True)
    if example.tools and tokens == _render(tokenizer, replace(example, tools=[]), messages, add_generation_prompt=True):
        raise DataError(
            f"{example.where}: the tokenizer's chat template makes no use of 'tools': leave them out, write them into "
            "a message, or use a tokenizer whose template knows them"
        )
    return tokens


def encode_conversation(tokenizer: Tokenizer, example: Example, loss_on: LossOn) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and for each of them whether it counts in the loss.

    Answers are found in one of three ways. A template with {% generation %} marks them itself. Otherwise an answer is
    what a longer conversation adds to a shorter one, if the template leaves the tokens before it alone. A template that
    does not is replaced by TRL's training template, if TRL is installed and has one for it.

    Raises:
        DataError: the template fails, or none of these ways is open.
    """
    if loss_on == "everything":
        tokens = _render(tokenizer, example, example.messages)
        return tokens, [True] * len(tokens)
    if loss_on == "last_answer":
        example = replace(example, context=len(example.messages) - 1)
    elif _marks_answers(getattr(tokenizer, "chat_template", None)) and (marked := _by_marks(tokenizer, example)):
        return marked
    found = _by_prefixes(tokenizer, example)
    if isinstance(found, tuple):
        return found
    training = _training_template(tokenizer) if loss_on == "answers" else None
    if training and (marked := _by_marks(tokenizer, example, chat_template=training)):
        return marked
    remedy = (
        "use a template that marks answers with {% generation %}, install trl, which has such templates for many "
        'models, or take the loss of the last answer only (loss_on "last_answer", --loss-on last_answer)'
        if loss_on == "answers" and found < len(example.messages) - 1
        else "write the row as prompt and completion, with chat_template false (--no-chat-template)"
    )
    raise DataError(
        f"{example.where}: the tokenizer's chat template must render a conversation as the prompt followed by the "
        f"answer, but it changes what stands before or in message {found + 1} once more is there: {remedy}"
    )


def _marks_answers(template: object) -> bool:
    texts = template.values() if isinstance(template, Mapping) else [template]
    return any(isinstance(text, str) and "generation %}" in text.replace("-%}", "%}") for text in texts)


def _by_marks(tokenizer: Tokenizer, example: Example, **more: Any) -> tuple[list[int], list[bool]] | None:
    """Return what a template with {% generation %} marks; None if the tokenizer does not say where its tokens stand."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    result = _apply(tokenizer, example, example.messages, return_assistant_tokens_mask=True, **more)
    if not isinstance(result, Mapping):  # mlx-lm's wrapper of a tokenizer returns the tokens alone
        return None
    tokens, mask = list(result["input_ids"]), [bool(one) for one in result["assistant_masks"]]
    if example.context:
        before = _apply(tokenizer, example, example.messages[: example.context], **more)["input_ids"]
        mask[: len(before)] = [False] * len(before)
    if not any(mask):
        raise DataError(f"{example.where}: the completion has no tokens: the chat template marks none of an answer")
    return tokens, mask


def _by_prefixes(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[bool]] | int:
    """Return the tokens and the answers in them, or the index of a message at which the template is no prefix.

    An assistant's message without one before it, a greeting, is not an answer.
    """
    messages = example.messages
    tokens = _render(tokenizer, example, messages)
    mask = [False] * len(tokens)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < max(1, example.context):
            continue
        begin = len(prompt := _render(tokenizer, example, messages[:index], add_generation_prompt=True))
        whole = tokens if index + 1 == len(messages) else _render(tokenizer, example, messages[: index + 1])
        if tokens[:begin] != prompt or tokens[: len(whole)] != whole:
            return index
        answer = whole[begin:]
        if tokenizer.eos_token_id in answer:  # generation stops there: the model never writes what follows
            answer = answer[: len(answer) - answer[::-1].index(tokenizer.eos_token_id)]
        if not answer:
            raise DataError(f"{example.where}: the completion has no tokens")
        mask[begin : begin + len(answer)] = [True] * len(answer)
    return tokens, mask


def _training_template(tokenizer: Tokenizer) -> str | None:
    """Return TRL's training form of the tokenizer's template, or None if there is none."""
    try:
        trl: Any = importlib.import_module("trl.chat_template_utils")
        template: str | None = trl.get_training_chat_template(tokenizer)
    except (ImportError, RuntimeError, AttributeError, ValueError, TypeError):  # not installed, too old, not known
        return None
    return template


def _render(
    tokenizer: Tokenizer, example: Example, messages: list[Message], add_generation_prompt: bool = False
) -> list[int]:
    return list(_apply(tokenizer, example, messages, add_generation_prompt, return_dict=False))


def _apply(
    tokenizer: Tokenizer,
    example: Example,
    messages: list[Message],
    add_generation_prompt: bool = False,
    return_dict: bool = True,
    **more: Any,
) -> Any:
    settings: dict[str, Any] = {**example.settings, **more, **({"tools": example.tools} if example.tools else {})}
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=return_dict, **settings
        )
    except Exception as error:  # a template is a program, and can reject a row with any exception
        raise DataError(
            f"{example.where}: the tokenizer's chat template fails on this conversation: {type(error).__name__}: "
            f"{error}"
        ) from error
