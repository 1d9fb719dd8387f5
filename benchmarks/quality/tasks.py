"""The tasks: two for the embedded Llama, one for a tiny T5, one for a real pretrained encoder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.docstrings import classified_docstrings
from benchmarks.minilm import Classifier, load_minilm
from benchmarks.t5 import pretrain as t5
from lora_one import demo
from lora_one.backends.torch.tuner import open_tuner
from lora_one.data import TokenSequence, encode, read_examples

from .task import Task

HARDER = demo.TRAIN.parent / "harder"
VALID = 256  # of the training file's end


def _llama(name: str, title: str, folder: Path) -> Task:
    tuner = open_tuner(demo.MODEL, "float32", "cpu")
    train, test = (
        [encode(tuner.tokenizer, example) for example in read_examples(folder / f"{split}.jsonl")]
        for split in ("train", "test")
    )

    def score(model: Any, items: Sequence[TokenSequence]) -> float:
        tuner.model = model
        answers = tuner.generate([item.tokens[: item.prompt_length] for item in items], max_new_tokens=10)
        eos = [tuner.tokenizer.eos_token_id]
        return sum(
            answer + eos == item.tokens[item.prompt_length :] for answer, item in zip(answers, items, strict=True)
        ) / len(items)

    return Task(
        name=name,
        title=title,
        base=tuner.model,
        train=train[:-VALID],
        valid=train[-VALID:],
        test=test,
        collate=lambda items: tuner.batches(items, len(items))[0],
        loss_fn=tuner.loss_fn,
        score=score,
        score_name="exact match",
        steps=100,
        batch_size=16,
        targets=r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    )


def sort() -> Task:
    """The embedded Llama on its task."""
    return _llama("sort", "embedded Llama: sort letters", demo.TRAIN.parent)


def desc() -> Task:
    """The embedded Llama on the shift that is harder for it."""
    return _llama("desc", "embedded Llama: sort letters descending, in upper case", HARDER)


def t5_desc() -> Task:
    """A tiny text-to-text model on the same shift."""
    tokenizer = t5.open_tokenizer()
    train, test = (
        [(str(example.prompt), example.completion) for example in read_examples(HARDER / f"{split}.jsonl")]
        for split in ("train", "test")
    )
    return Task(
        name="t5",
        title="tiny T5: sort letters descending, in upper case",
        base=t5.open_model(),
        train=train[:-VALID],
        valid=train[-VALID:],
        test=test,
        collate=lambda items: t5.collate(tokenizer, list(items)),
        loss_fn=lambda model, batch: model(**batch).loss,
        score=lambda model, items: t5.exact_match(model, tokenizer, list(items)),
        score_name="exact match",
        steps=100,
        batch_size=16,
        targets=r".*\.(q|k|v|o|wi|wo)",
    )


def classification(fit_head: bool) -> Task:
    """MiniLM telling which package of the standard library a docstring is from; its head fitted first, or random."""
    encoder, tokenizer = load_minilm()
    texts, classes = classified_docstrings(classes=16, largest=225)
    test, valid, train = texts[:256], texts[256:512], texts[512:]
    torch.manual_seed(0)
    model = Classifier(encoder, len(classes))

    def collate(items: Sequence[tuple[int, str]]) -> tuple[dict[str, Tensor], Tensor]:
        tokens = tokenizer(
            [text for _, text in items], return_tensors="pt", padding=True, truncation=True, max_length=32
        )
        return dict(tokens), torch.tensor([label for label, _ in items])

    def loss_fn(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def score(model: nn.Module, items: Sequence[tuple[int, str]]) -> float:
        model.eval()
        right = 0
        for i in range(0, len(items), 64):
            tokens, labels = collate(items[i : i + 64])
            right += int((model(tokens).argmax(-1) == labels).sum())
        return right / len(items)

    if fit_head:
        model.fit_head([collate(train[i : i + 64]) for i in range(0, len(train), 64)])
    return Task(
        name="minilm",
        title="MiniLM: which package is a docstring from",
        base=model,
        train=train,
        valid=valid,
        test=test,
        collate=collate,
        loss_fn=loss_fn,
        score=score,
        score_name="accuracy",
        steps=40,
        batch_size=16,
        init_batches=4,
        targets=r"encoder\.encoder\..*\.(query|key|value|dense)",
        modules_to_save=("head",),
    )


TASKS: dict[str, Callable[[], Task]] = {
    "sort": sort,
    "desc": desc,
    "t5": t5_desc,
    "minilm": lambda: classification(fit_head=True),
    "minilm-random": lambda: classification(fit_head=False),
}
