"""Answers of a model to prompts."""

from collections.abc import Sequence
from typing import Any

from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.tuners.interface import Tuner


def answers(tuner: Tuner, questions: Sequence[TokenSequence], max_new_tokens: int) -> list[str]:
    """Return the text that the model writes after each prompt, by greedy decoding."""
    prompts = [question.tokens[: question.prompt_length] for question in questions]
    pictures = [question.pictures for question in questions]
    options: dict[str, Any] = {"pictures": pictures} if any(pictures) else {}
    continuations = tuner.generate(prompts, max_new_tokens=max_new_tokens, **options)
    return [tuner.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in continuations]
