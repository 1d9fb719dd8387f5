"""Answers of a model to prompts."""

from collections.abc import Sequence
from typing import Any

from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.progress import Progress
from lora_one.finetune.tuners.interface import Tuner


def answers(tuner: Tuner, questions: Sequence[TokenSequence], max_new_tokens: int, progress: Progress) -> list[str]:
    """Return the text that the model writes after each prompt, by greedy decoding."""
    prompts = [question.tokens[: question.prompt_length] for question in questions]
    pictures = [question.pictures for question in questions]
    options: dict[str, Any] = {"pictures": pictures} if any(pictures) else {}

    def tell(done: int) -> None:
        progress.part(done, len(prompts))

    continuations = tuner.generate(prompts, max_new_tokens=max_new_tokens, tell=tell, **options)
    return [tuner.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in continuations]
