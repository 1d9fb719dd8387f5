"""Fine-tuning an image-text model: pictures are processed when their batch is made, so that they fill no memory."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_one.errors import DataError
from lora_one.finetune.data import Pictures, TokenSequence

from .causal import TorchTuner

TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}  # of a processor's result


class VisionTuner(TorchTuner):
    """See `lora_one.finetune.tuners.interface.Tuner`; prompts have one image token for each picture."""

    generated_at_once = 16

    def __init__(self, model: nn.Module, processor: Any):
        super().__init__(model, processor.tokenizer)
        self._processor = processor
        self._image_token = processor.image_token_id

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, pictures: Sequence[Pictures | None] | None = None
    ) -> list[list[int]]:
        self.model.eval()
        found: list[list[int]] = []
        asked = [
            TokenSequence(prompt, len(prompt), seen)
            for prompt, seen in zip(prompts, pictures or [None] * len(prompts), strict=True)
        ]
        for start in range(0, len(asked), self.generated_at_once):
            part, features = self._see(asked[start : start + self.generated_at_once])
            batch = self._pad_prompts([sequence.tokens for sequence in part], left=True)
            found += self._continue({**batch, **features}, max_new_tokens)
        return found

    def _collate(self, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
        whole, features = self._see(sequences)
        return {**super()._collate(whole), **features}

    def _see(self, sequences: Sequence[TokenSequence]) -> tuple[list[TokenSequence], dict[str, Tensor]]:
        """The sequences with as many image tokens as each picture has features, and the pictures' tensors."""
        features: dict[str, list[Tensor]] = defaultdict(list)
        whole = []
        for sequence in sequences:
            marked = sequence.tokens.count(self._image_token)
            pictures = [] if sequence.pictures is None else sequence.pictures()[:marked]  # later turns may have more
            if marked > len(pictures):
                text = self.tokenizer.decode(sequence.tokens)
                raise DataError(
                    f"a picture an image token is expected, got {len(pictures)} for {marked}: {text!r:.200}"
                )
            lengths = []
            for picture in pictures:
                seen = self._processor(text=self._processor.image_token, images=picture, return_tensors="pt")
                lengths.append(int((seen["input_ids"] == self._image_token).sum()))
                for name in seen.keys() - TEXT:
                    features[name].append(seen[name])
            whole.append(_widened(sequence, self._image_token, lengths))
        dtype = self.model.dtype
        joined = {name: torch.cat(parts) for name, parts in features.items()}
        return whole, {name: x.to(dtype) if x.is_floating_point() else x for name, x in joined.items()}


def _widened(sequence: TokenSequence, image_token: int, lengths: Sequence[int]) -> TokenSequence:
    """Each image token repeated as often as `lengths` say; they are all in the prompt."""
    remaining = iter(lengths)
    tokens: list[int] = []
    for token in sequence.tokens:
        tokens += [token] * (next(remaining) if token == image_token else 1)
    added = len(tokens) - len(sequence.tokens)
    return replace(sequence, tokens=tokens, prompt_length=sequence.prompt_length + added)
