"""Examples as token sequences: what a tokenizer, and its chat template, make of them."""

from dataclasses import dataclass, field, replace

from lora_one.backends.interface import IGNORED

from .data import Example, Pictures
from .template import LossOn, Tokenizer, encode_conversation, encode_prompt_messages, has_template


@dataclass(frozen=True)
class TokenSequence:
    """An example in tokens, or several of them packed into one row.

    Attributes:
        tokens: the prompt, the completion and the end-of-sequence token.
        prompt_length: the number of tokens before the last answer.
        pictures: see `Example`; the prompt has one image token for each.
        where: see `Example`.
        learnt: whether each token counts in the loss; None: all after the prompt.
        lengths: the numbers of tokens of packed examples; empty for one example.
    """

    tokens: list[int]
    prompt_length: int
    pictures: Pictures | None = None
    where: str = field(default="", compare=False)
    learnt: tuple[bool, ...] | None = None
    lengths: tuple[int, ...] = ()

    @property
    def labels(self) -> list[int]:
        """The tokens that count in the loss, and -100 for all others. Nothing predicts the first one of an example."""
        learnt = list(self.mask)
        start = 0
        for length in self.lengths or (len(learnt),):
            learnt[start : start + 1] = [False]
            start += length
        return [token if counts else IGNORED for token, counts in zip(self.tokens, learnt, strict=True)]

    @property
    def mask(self) -> tuple[bool, ...]:
        """`learnt`, spelled out."""
        if self.learnt is not None:
            return self.learnt
        return (False,) * self.prompt_length + (True,) * (len(self.tokens) - self.prompt_length)

    @property
    def counted(self) -> int:
        """The number of tokens that count in the loss."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def position_ids(self) -> list[int]:
        """The position of each token in its own example."""
        return [position for length in self.lengths or (len(self.tokens),) for position in range(length)]

    def cut(self, length: int, separate: bool = False) -> "TokenSequence | None":
        """Return the first `length` tokens: itself if it is not longer, None if none of them counts in the loss.

        Args:
            length: the largest number of tokens to keep.
            separate: cut prompt and completion separately, for an encoder-decoder, in which they are two sequences.
        """
        if not separate:
            if len(self.tokens) <= length:
                return self
            learnt = None if self.learnt is None else self.learnt[:length]
            prompt_length = min(self.prompt_length, length)
            short = replace(self, tokens=self.tokens[:length], prompt_length=prompt_length, learnt=learnt)
            return short if short.counted else None
        prompt, completion = self.tokens[: self.prompt_length], self.tokens[self.prompt_length :]
        if len(prompt) < length and len(completion) <= length:
            return self
        prompt = prompt[: length - 1]  # the encoder's text ends with an end-of-sequence token
        return replace(self, tokens=[*prompt, *completion[:length]], prompt_length=len(prompt), learnt=None)


def encode(
    tokenizer: Tokenizer, example: Example, loss_on: LossOn = "answers", chat_template: bool = True
) -> TokenSequence:
    """Return an example in the tokens of a Hugging Face tokenizer.

    Use it on what `read_examples` returns, to build batches for a training loop of your own: `sequence.labels` is -100
    where a token does not count. A conversation goes through the tokenizer's chat template, together with its tools.
    So do prompt and completion if there is a template; otherwise their tokens end with the end-of-sequence token.

    Args:
        tokenizer: for instance `transformers.AutoTokenizer.from_pretrained(folder)`.
        example: one training example.
        loss_on: the tokens that count: "answers" (of all turns, or the completion), "last_answer", "everything".
        chat_template: False leaves prompt and completion as they are written.

    Returns:
        The tokens, and which of them count in the loss.

    Raises:
        DataError: the example is a conversation, and the tokenizer has no chat template, or one that fails on it,
            makes no use of its tools, or changes an answer or what stands before it once more is there.

    >>> from transformers import AutoTokenizer
    >>> from lora_one import demo
    >>> from lora_one.finetune import encode, read_examples
    >>> tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    >>> sequence = encode(tokenizer, read_examples(demo.TRAIN)[0])
    >>> sequence.tokens[-1] == tokenizer.eos_token_id, 0 < sequence.prompt_length < len(sequence.tokens)
    (True, True)
    """
    prompt = encode_prompt(tokenizer, example, chat_template)
    if _is_conversation(tokenizer, example, chat_template):
        tokens, mask = encode_conversation(tokenizer, example, loss_on)
    else:
        tokens = [*prompt, *tokenizer.encode(example.completion, add_special_tokens=False), tokenizer.eos_token_id]
        mask = [loss_on == "everything"] * len(prompt) + [True] * (len(tokens) - len(prompt))
    after_prompt = mask == [False] * len(prompt) + [True] * (len(tokens) - len(prompt))
    return TokenSequence(
        tokens, len(prompt), example.pictures, example.where, learnt=None if after_prompt else tuple(mask)
    )


def encode_prompt(tokenizer: Tokenizer, example: Example, chat_template: bool = True) -> list[int]:
    """Return the tokens before the last answer only, ready for it to be generated."""
    if _is_conversation(tokenizer, example, chat_template):
        return encode_prompt_messages(tokenizer, example, example.messages[:-1])
    assert isinstance(example.prompt, str)
    tokens = list(tokenizer.encode(example.prompt))
    # Some tokenizers end every text with an end-of-sequence token, but here the completion still follows.
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens


def _is_conversation(tokenizer: Tokenizer, example: Example, chat_template: bool) -> bool:
    if not isinstance(example.prompt, str):
        return True
    return chat_template and bool(example.prompt) and not example.as_written and has_template(tokenizer)
