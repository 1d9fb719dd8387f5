"""Tiny models of every kind that `init` takes, with random weights and fixed batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


class Case(NamedTuple):
    """A model, what to feed it, and how to get a loss."""

    model: nn.Module
    batches: list[Any]
    loss_fn: Callable[[nn.Module, Any], Tensor] | None


def tokens(seed: int, rows: int = 4, length: int = 10, vocabulary: int = 60) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def causal_batches(count: int = 2) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(i), "labels": tokens(i)} for i in range(count)]


def llama(dtype: torch.dtype = torch.float32, tie: bool = False, dropout: float = 0.0) -> Case:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        attention_dropout=dropout,
    )
    return Case(LlamaForCausalLM(config).to(dtype), causal_batches(), None)


def gpt2() -> Case:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return Case(GPT2LMHeadModel(config), causal_batches(), None)


def t5() -> Case:
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return Case(T5ForConditionalGeneration(config), causal_batches(), None)


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
    )


def _pooled_regression(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"]).pooler_output.pow(3).mean()


def bert() -> Case:
    torch.manual_seed(0)
    return Case(BertModel(bert_config()), [{"input_ids": tokens(i)} for i in range(2)], _pooled_regression)


def classifier() -> Case:
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config())
    batches = [{"input_ids": tokens(i), "labels": torch.tensor([0, 1, 2, 1])} for i in range(2)]
    return Case(model, batches, None)


class Mlp(nn.Module):
    """A plain module; `shared` is called twice in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 24)
        self.shared = nn.Linear(24, 24, bias=False)
        self.down = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        return self.down(torch.tanh(self.shared(torch.tanh(self.shared(h)))))


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).pow(2).mean()


def mlp(dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 12, dtype=dtype), torch.randn(16, 10, dtype=dtype)) for _ in range(3)]
    return Case(Mlp().to(dtype), batches, squared_error)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "bert": bert,
    "classifier": classifier,
}

# (50, 7) matrices as they may lie in memory
LAYOUTS = {
    "expanded": torch.randn(7, generator=torch.Generator().manual_seed(0)).expand(50, 7),
    "one number": torch.ones(()).expand(50, 7),  # as the gradient of a sum is
    "strided": torch.randn(100, 14, generator=torch.Generator().manual_seed(0))[::2, ::2],
    "transposed": torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).mT,
}
