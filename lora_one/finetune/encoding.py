"""Examples as token sequences: what a tokenizer, and its chat template, make of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lora_one.errors import DataError

from .chat import Message
from .data import Example, Pictures


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
    ) -> list[int]: ...


@dataclass(frozen=True)
class TokenSequence:
    """An example in tokens. Training minimises the loss of the tokens after the prompt.

    Attributes:
        tokens: the prompt, the completion and the end-of-sequence token.
        prompt_length: the number of tokens of the prompt.
        pictures: see `Example`; the prompt has one image token for each.
        where: see `Example`.
    """

    tokens: list[int]
    prompt_length: int
    pictures: Pictures | None = None
    where: str = field(default="", compare=False)

    def cut(self, length: int, separate: bool = False) -> "TokenSequence | None":
        """Return the first `length` tokens, or None if the prompt alone fills them.

        Args:
            length: the largest number of tokens to keep.
            separate: cut prompt and completion separately, for an encoder-decoder, in which they are two sequences.
        """
        if not separate:
            return None if self.prompt_length >= length else replace(self, tokens=self.tokens[:length])
        prompt, completion = self.tokens[: self.prompt_length], self.tokens[self.prompt_length :]
        prompt = prompt[: length - 1]  # the encoder's text ends with an end-of-sequence token
        return replace(self, tokens=[*prompt, *completion[:length]], prompt_length=len(prompt))


def encode(tokenizer: Tokenizer, example: Example) -> TokenSequence:
    """Return an example in the tokens of a Hugging Face tokenizer.

    Use it on what `read_examples` returns, to build batches for a training loop of your own. The tokens are the
    prompt, the completion and the end-of-sequence token. A conversation goes through the tokenizer's chat template,
    together with its tools.

    Args:
        tokenizer: for instance `transformers.AutoTokenizer.from_pretrained(folder)`.
        example: one training example.

    Returns:
        The tokens and the length of the prompt, whose tokens should not count in the loss.

    Raises:
        DataError: the example is a conversation, and the tokenizer has no chat template, or one that fails on it,
            makes no use of its tools, or changes the prompt once the answer is there.

    >>> from transformers import AutoTokenizer
    >>> from lora_one import demo
    >>> from lora_one.finetune import encode, read_examples
    >>> tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    >>> sequence = encode(tokenizer, read_examples(demo.TRAIN)[0])
    >>> sequence.tokens[-1] == tokenizer.eos_token_id, 0 < sequence.prompt_length < len(sequence.tokens)
    (True, True)
    """
    prompt = encode_prompt(tokenizer, example)
    if isinstance(example.prompt, str):
        completion = tokenizer.encode(example.completion, add_special_tokens=False)
        tokens = [*prompt, *completion, tokenizer.eos_token_id]
        return TokenSequence(tokens, len(prompt), example.pictures, example.where)
    answer = example.answer or {"role": "assistant", "content": example.completion}
    tokens = _apply_template(tokenizer, example, [*example.prompt, answer], add_generation_prompt=False)
    if tokens[: len(prompt)] != prompt:
        raise DataError(
            f"{example.where}: the tokenizer's chat template must render a conversation as the prompt followed by the "
            "answer, but it changes the prompt once the answer is there: use prompt/completion lines instead"
        )
    if len(tokens) == len(prompt):
        raise DataError(f"{example.where}: the completion has no tokens")
    return TokenSequence(tokens, len(prompt), example.pictures, example.where)


def encode_prompt(tokenizer: Tokenizer, example: Example) -> list[int]:
    """Return the tokens of the prompt only, ready for the completion to be generated."""
    if not isinstance(example.prompt, str):
        return _encode_messages(tokenizer, example, example.prompt)
    tokens = list(tokenizer.encode(example.prompt))
    # Some tokenizers end every text with an end-of-sequence token, but here the completion still follows.
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens


def _encode_messages(tokenizer: Tokenizer, example: Example, messages: list[Message]) -> list[int]:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(f"{example.where}: 'messages' need a tokenizer with a chat template, and this one has none")
    unused = [name for name in example.settings if isinstance(template, str) and name not in template]
    if unused:
        raise DataError(
            f"{example.where}: the tokenizer's chat template makes no use of {', '.join(unused)}: leave it out of "
            "'chat_template_kwargs'"
        )
    tokens = _apply_template(tokenizer, example, messages, add_generation_prompt=True)
    if example.tools and tokens == _apply_template(tokenizer, replace(example, tools=[]), messages, True):
        raise DataError(
            f"{example.where}: the tokenizer's chat template makes no use of 'tools': leave them out, write them into "
            "a message, or use a tokenizer whose template knows them"
        )
    return tokens


def _apply_template(
    tokenizer: Tokenizer, example: Example, messages: list[Message], add_generation_prompt: bool
) -> list[int]:
    settings: dict[str, Any] = {**example.settings, **({"tools": example.tools} if example.tools else {})}
    try:
        return list(
            tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False, **settings
            )
        )
    except Exception as error:  # a template is a program, and can reject a row with any exception
        raise DataError(
            f"{example.where}: the tokenizer's chat template fails on this conversation: {type(error).__name__}: "
            f"{error}"
        ) from error


def cut_all(sequences: list[TokenSequence], length: int | None, separate: bool) -> list[TokenSequence]:
    """Return the sequences cut to `length` tokens, without those whose prompt alone fills them; None cuts nothing."""
    if length is None:
        return sequences
    return [short for sequence in sequences if (short := sequence.cut(length, separate)) is not None]
