"""Fine-tuning an encoder-decoder: the encoder reads the prompt, the decoder writes the completion."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_one.finetune.data import TokenSequence

from .causal import IGNORED, TorchTuner


class Seq2SeqTuner(TorchTuner):
    """See `lora_one.finetune.tuners.interface.Tuner`."""

    separate = True

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        self.model.eval()
        found: list[list[int]] = []
        for start in range(0, len(prompts), self.generated_at_once):
            part = [self._closed(prompt) for prompt in prompts[start : start + self.generated_at_once]]
            found += self._continue(self._pad_prompts(part, left=False), max_new_tokens)
        return found

    def _given(self, batch: dict[str, Tensor]) -> int:
        return 1  # the token that the decoder starts from

    def _closed(self, prompt: list[int]) -> list[int]:
        """The prompt as the encoder knows texts: with the end-of-sequence token that `encode` takes off."""
        return [*prompt, self.tokenizer.eos_token_id]

    def _collate(self, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
        batch = self._pad_prompts([self._closed(s.tokens[: s.prompt_length]) for s in sequences], left=False)
        completions = [torch.tensor(s.tokens[s.prompt_length :]) for s in sequences]
        labels = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=IGNORED)
        return {**batch, "labels": labels}  # the model shifts the labels into the decoder's input itself
