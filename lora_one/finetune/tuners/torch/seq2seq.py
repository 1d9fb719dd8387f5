"""Fine-tuning an encoder-decoder: the encoder reads the prompt, the decoder writes the completion."""

from collections.abc import Sequence

import torch

from lora_one.backends.interface import IGNORED
from lora_one.finetune.encoding import TokenSequence

from .causal import Batch, TorchTuner


class Seq2SeqTuner(TorchTuner):
    """An encoder-decoder of transformers: see `lora_one.finetune.tuners.interface.Tuner`."""

    separate = True

    def _prompt_batch(self, prompts: Sequence[list[int]]) -> Batch:
        """Return a batch for the encoder, whose texts end with the end-of-sequence token that `encode` removes."""
        return self._pad_prompts([[*prompt, self.tokenizer.eos_token_id] for prompt in prompts], left=False)

    def _given(self, batch: Batch) -> int:
        return 1  # the token that the decoder starts from

    def _collate(self, sequences: Sequence[TokenSequence]) -> Batch:
        batch = self._prompt_batch([s.tokens[: s.prompt_length] for s in sequences])
        completions = [torch.tensor(s.tokens[s.prompt_length :]) for s in sequences]
        labels = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=IGNORED)
        return {**batch, "labels": labels}  # the model makes the decoder's input from the labels
