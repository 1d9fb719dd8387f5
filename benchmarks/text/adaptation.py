"""The jobs of adaptation as tasks of benchmarks.quality, on a CPU or a GPU, and who does them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from benchmarks.quality.contenders import CONTENDERS, Contender, ours, without_data
from benchmarks.quality.plan import EVEN, PAPER
from benchmarks.quality.task import Task
from lora_one.finetune.encoding import TokenSequence

from .corpus import Corpus
from .sizes import SPLITS, Size
from .tokens import cpp_items, summary_items

# One of a name of benchmarks.quality is the same there.
WHO: dict[str, Contender] = {
    **{name: CONTENDERS[name] for name in ("full fine-tuning", "LoRA", "rsLoRA", "LoRA+", "LoRA-GA")},
    **{name: CONTENDERS[name] for name in (PAPER, EVEN)},
    "LoRA-One, deferred": Contender(without_data, optimizer=ours(start_steps="auto")),
}
ITEMS = {"cpp": cpp_items, "summaries": summary_items}
IGNORED = -100
Batch = tuple[Tensor, Tensor]  # tokens and labels, both int64 (items, longest)


def make_task(name: str, corpus: Corpus, model: nn.Module, size: Size, device: str) -> Task:
    """Adaptation of a pretrained model, which goes to the device; it is not changed."""
    tokenizer = Tokenizer.from_str(corpus.tokenizer)
    items = {
        split: ITEMS[name](tokenizer, corpus.parts[f"{name}/{split}"], size, size.items[split]) for split in SPLITS
    }
    if short := [split for split in SPLITS if len(items[split]) < size.adapt_batch]:
        raise ValueError(f"the corpus has too few items of {name} for {', '.join(short)}: pack one where packages are")
    return Task(
        name=name,
        base=model.to(device),
        train=items["train"],
        valid=items["valid"],
        test=items["test"],
        fresh=items["test"],  # nobody has looked at any
        collate=lambda batch: collate(batch, device),
        loss_fn=loss_fn,
        score=token_accuracy,
        steps=size.adapt_steps,
        batch_size=size.adapt_batch,
        targets=r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        init_batches=size.init_batches,
        clock=clock(device),
    )


def clock(device: str) -> Callable[[], float]:
    """Processor seconds on a CPU, which others may use too; on a GPU wall seconds, once all that was asked is done."""

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return time.process_time if device == "cpu" else wall


def collate(items: Sequence[TokenSequence], device: str) -> Batch:
    """A batch, filled up on the right, where causal attention never looks; what does not count is labelled -100."""
    longest = max(len(item.tokens) for item in items)
    ids = [item.tokens + [0] * (longest - len(item.tokens)) for item in items]
    labels = [item.labels + [IGNORED] * (longest - len(item.tokens)) for item in items]
    return torch.tensor(ids).to(device), torch.tensor(labels).to(device)


def loss_fn(model: Any, batch: Batch) -> Tensor:
    """The mean loss of the tokens that count."""
    loss: Tensor = model(input_ids=batch[0], labels=batch[1]).loss
    return loss


@torch.no_grad()
def token_accuracy(model: Any, items: Sequence[TokenSequence]) -> float:
    """The share of the tokens that count that the model holds most likely."""
    model.eval()
    device = next(model.parameters()).device.type
    right, counted = 0, 0
    for i in range(0, len(items), 64):
        ids, labels = collate(items[i : i + 64], device)
        best = model(input_ids=ids).logits[:, :-1].argmax(-1)  # (items, longest - 1)
        right += int((best == labels[:, 1:]).sum())
        counted += int((labels[:, 1:] != IGNORED).sum())
    return round(right / counted, 4)
