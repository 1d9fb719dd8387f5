"""The tasks: two for the embedded Llama, one for a tiny T5, one for a real pretrained encoder."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.docstrings import ORDERS, disordered_docstrings
from benchmarks.minilm import Classifier, load_minilm
from benchmarks.t5 import pretrain as t5
from lora_one import demo
from lora_one.demo import tasks as demo_tasks
from lora_one.finetune.data import Example, read_examples
from lora_one.finetune.encoding import TokenSequence, encode
from lora_one.finetune.tuners.torch.opening import open_tuner

from .task import Task

HARDER = demo.TRAIN.parent / "harder"
VALID = 256  # of the training items' end
FRESH, FRESH_SEED = 512, 1
SPLITS: tuple[tuple[demo_tasks.Split, int], ...] = (("train", 2048), ("test", 256))


NUMPY = Path(np.__file__).parent  # docstrings that no text of the standard library's is among


def unseen(skill: demo_tasks.Task, seen: Iterable[str]) -> list[dict[str, str]]:
    """New items of the test split, none of which has one of the prompts `seen`."""
    seen = set(seen)
    items = skill.items("test", FRESH + len(seen), FRESH_SEED)
    return [item for item in items if item["prompt"] not in seen][:FRESH]


def _llama(name: str, folder: Path, skill: str, steps: int = 100, batch_size: int = 16) -> Task:
    tuner = open_tuner(demo.MODEL, "float32", "cpu")
    train, test = (
        [encode(tuner.tokenizer, example) for example in read_examples(folder / f"{split}.jsonl")]
        for split in ("train", "test")
    )
    seen = [example.prompt for example in read_examples(folder / "test.jsonl")]
    new = unseen(demo_tasks.FINETUNE[skill], seen)
    fresh = [encode(tuner.tokenizer, Example(item["prompt"], item["completion"], "fresh")) for item in new]

    def score(model: Any, items: Sequence[TokenSequence]) -> float:
        tuner.model = model
        answers = tuner.generate([item.tokens[: item.prompt_length] for item in items], max_new_tokens=10)
        eos = [tuner.tokenizer.eos_token_id]
        return sum(
            answer + eos == item.tokens[item.prompt_length :] for answer, item in zip(answers, items, strict=True)
        ) / len(items)

    return Task(
        name=name,
        base=tuner.model,
        train=train[:-VALID],
        valid=train[-VALID:],
        test=test,
        fresh=fresh,
        collate=lambda items: tuner.batches(items, len(items))[0],
        loss_fn=tuner.loss_fn,
        score=score,
        steps=steps,
        batch_size=batch_size,
        targets=r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    )


def sort() -> Task:
    """The embedded Llama on its task."""
    return _llama("sort", demo.TRAIN.parent, "main")


def sort_long() -> Task:
    """The same for longer: four times the data."""
    return _llama("sort-long", demo.TRAIN.parent, "main", steps=200, batch_size=32)


def desc() -> Task:
    """The embedded Llama on the shift that is harder for it."""
    return _llama("desc", HARDER, "harder")


def t5_top() -> Task:
    """A tiny text-to-text model, which knows the largest letter of a word, on: that letter in upper case."""
    tokenizer = t5.open_tokenizer()
    top = demo_tasks.Task("top", demo_tasks.word(3, 8), lambda text: max(text).upper())
    train, test = (
        [(item["prompt"], item["completion"]) for item in top.items(split, count)] for split, count in SPLITS
    )
    return Task(
        name="t5",
        base=t5.open_model(),
        train=train[:-VALID],
        valid=train[-VALID:],
        test=test,
        fresh=[(item["prompt"], item["completion"]) for item in unseen(top, [prompt for prompt, _ in test])],
        collate=lambda items: t5.collate(tokenizer, list(items)),
        loss_fn=lambda model, batch: model(**batch).loss,
        score=lambda model, items: t5.exact_match(model, tokenizer, list(items)),
        steps=100,
        batch_size=16,
        targets=r".*\.(q|k|v|o|wi|wo)",
    )


def _words(item: tuple[int, str]) -> tuple[str, ...]:
    """The words of a text in whatever order, by which it is the same text."""
    return tuple(sorted(item[1].split()))


def word_order(fit_head_on: int) -> Task:
    """MiniLM telling in which order the words of a docstring are.

    The embedding of a frozen encoder says little about order: there is much to learn above what a fitted head can do.

    Args:
        fit_head_on: training texts, at most, that the head is fitted on before anything else; 0 leaves it random.
    """
    encoder, tokenizer = load_minilm()
    texts = disordered_docstrings()
    test, valid, train = texts[:1024], texts[1024:1536], texts[1536:]
    known = set(map(_words, texts))
    torch.manual_seed(0)
    model = Classifier(encoder, len(ORDERS))

    def collate(items: Sequence[tuple[int, str]]) -> tuple[dict[str, Tensor], Tensor]:
        tokens = tokenizer(
            [text for _, text in items], return_tensors="pt", padding=True, truncation=True, max_length=16
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

    if fit_head_on:
        seen = train[:fit_head_on]
        model.fit_head([collate(seen[i : i + 64]) for i in range(0, len(seen), 64)])
    return Task(
        name="minilm",
        base=model,
        train=train,
        valid=valid,
        test=test,
        fresh=[item for item in disordered_docstrings(root=NUMPY) if _words(item) not in known][:FRESH],
        collate=collate,
        loss_fn=loss_fn,
        score=score,
        steps=100,
        batch_size=16,
        targets=r"encoder\.encoder\..*\.(query|key|value|dense)",
        modules_to_save=("head",),
    )


TASKS: dict[str, Callable[[], Task]] = {
    "sort": sort,
    "sort-long": sort_long,
    "desc": desc,
    "t5": t5_top,
    "minilm": lambda: word_order(fit_head_on=4096),
    "minilm-random": lambda: word_order(fit_head_on=0),
}


@functools.cache
def opened(name: str) -> Task:
    """A task by its name, opened once in a process."""
    return TASKS[name]()
