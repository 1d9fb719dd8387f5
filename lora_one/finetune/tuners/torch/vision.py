"""Fine-tuning an image-text model. Pictures are processed when their batch is made, so that few are in memory."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from lora_one.errors import DataError
from lora_one.finetune.data import Pictures
from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.tuners.interface import untold
from lora_one.finetune.tuners.shared import chunks

from .causal import Batch, TorchTuner

T = TypeVar("T")

# The entries of a processor's result that describe the text, and not the pictures.
TEXT_ENTRIES = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


class VisionTuner(TorchTuner):
    """An image-text model of transformers: see `lora_one.finetune.tuners.interface.Tuner`.

    Prompts have one image token for each picture.
    """

    reads_pictures = True
    generated_at_once = 16

    def __init__(self, model: nn.Module, processor: ProcessorMixin):
        super().__init__(model, processor.tokenizer)
        self._processor = processor
        self._image_token = processor.image_token_id

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        tell: Callable[[int], None] = untold,
        pictures: Sequence[Pictures | None] | None = None,
    ) -> list[list[int]]:
        self.model.eval()
        questions = [
            TokenSequence(prompt, len(prompt), pictures_of_prompt)
            for prompt, pictures_of_prompt in zip(prompts, pictures or [None] * len(prompts), strict=True)
        ]
        answers: list[list[int]] = []
        for group in chunks(questions, self.generated_at_once):
            widened, features = self._process(group)
            batch = self._prompt_batch([sequence.tokens for sequence in widened])
            answers += self._continue({**batch, **features}, max_new_tokens)
            tell(len(answers))
        return answers

    def _collate(self, sequences: Sequence[TokenSequence]) -> Batch:
        widened, features = self._process(sequences)
        return {**super()._collate(widened), **features}

    def _process(self, sequences: Sequence[TokenSequence]) -> tuple[list[TokenSequence], Batch]:
        """Return the sequences with one image token per feature of each picture, and the tensors of the pictures."""
        features: dict[str, list[Tensor]] = defaultdict(list)
        widened = []
        for sequence in sequences:
            marked = sequence.tokens.count(self._image_token)
            # Pictures beyond the image tokens belong to later turns of the conversation.
            pictures = [] if sequence.pictures is None else sequence.pictures()[:marked]
            if marked > len(pictures):
                text = self.tokenizer.decode(sequence.tokens)
                raise DataError(
                    f"a picture an image token is expected, got {len(pictures)} for {marked}: {text!r:.200}"
                )
            lengths = []
            for picture in pictures:
                result = self._processor(text=self._processor.image_token, images=picture, return_tensors="pt")
                lengths.append(int((result["input_ids"] == self._image_token).sum()))
                for name in result.keys() - TEXT_ENTRIES:
                    features[name].append(result[name])
            widened.append(_widened(sequence, self._image_token, lengths))
        dtype = self.model.dtype
        joined = {name: torch.cat(parts) for name, parts in features.items()}
        return widened, {name: x.to(dtype) if x.is_floating_point() else x for name, x in joined.items()}


def _widened(sequence: TokenSequence, image_token: int, lengths: Sequence[int]) -> TokenSequence:
    """Return the sequence with its image tokens, which are all in the prompt, repeated as `lengths` say."""
    remaining = iter(lengths)
    times = [next(remaining) if token == image_token else 1 for token in sequence.tokens]

    def repeated(values: Sequence[T]) -> list[T]:
        return [value for value, count in zip(values, times, strict=True) for _ in range(count)]

    prompt_length = sum(times[: sequence.prompt_length])
    learnt = None if sequence.learnt is None else tuple(repeated(sequence.learnt))
    return replace(sequence, tokens=repeated(sequence.tokens), prompt_length=prompt_length, learnt=learnt)
