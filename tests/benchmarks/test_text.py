"""Adaptation of a decoder: its text, its items and losses, and its search for rates."""

import importlib.metadata
import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.quality.plan import TODAY
from benchmarks.text import corpus, pretraining, runs
from benchmarks.text.adaptation import WHO, collate, loss_fn, make_task, token_accuracy
from benchmarks.text.sizes import SIZES, SMOKE, SPLITS
from benchmarks.text.sources import Source, permissive_licence
from benchmarks.text.summary import chosen_rate
from benchmarks.text.tokens import ASK, END, cpp_items, stream, summary_items, train_tokenizer
from lora_one.finetune.encoding import TokenSequence

TINY = replace(
    SMOKE,
    name="tiny",
    vocabulary=320,
    hidden=32,
    layers=2,
    heads=2,
    context=32,
    steps=3,
    batch=4,
    window=24,
    items={"train": 32, "valid": 8, "test": 8},
    strides=(3, 1),
    adapt_steps=12,
    adapt_batch=4,
    init_batches=2,
    rank=2,
)


def python(number: int) -> str:
    """A module that no other number gives."""
    return f'''import math

def area_{number}(radius, scale={number}):
    """Return the area of circle number {number}.

    More of it.
    """
    return scale * math.pi * radius ** 2
'''


def cpp(number: int) -> str:
    lines = (f"  template <int N> double value_{number}_{i}(const T& x) {{ return {i} * x; }}" for i in range(20))
    return f"// File {number}\nnamespace n{number} {{\n" + "\n".join(lines) + "\n}\n"


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """Packages of pretraining and of summaries, with C++ and with what must not be taken."""
    root, found = tmp_path_factory.mktemp("packages"), []
    for k, name in enumerate(("alpha", "beta", "networkx", "tornado")):
        texts = {f"{name}/m{i}.py": python(100 * k + i) for i in range(40)}
        texts |= {f"{name}/include/f{i}.h": cpp(100 * k + i) for i in range(30)}
        texts |= {f"{name}/tests/test_x.py": python(100 * k + 90), f"{name}/made.h": "// @generated\n" + cpp(1000 + k)}
        texts |= {f"{name}/same.py": python(5000), f"{name}/_vendor/v.py": python(100 * k + 91)}
        for path, text in texts.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        found.append(Source(name, "1.0", "MIT", {path: root / path for path in texts}))
    return found


@pytest.fixture(scope="module")
def small(made_up):
    return corpus.collect(TINY, made_up)


@pytest.fixture(scope="module")
def tokenizer(small):
    return Tokenizer.from_str(small.tokenizer)


def test_a_corpus_is_the_same_each_time_and_its_pack_gives_it_back(made_up, small, tmp_path):
    reversed_files = [replace(s, files=dict(reversed(s.files.items()))) for s in made_up]
    assert corpus.collect(TINY, reversed_files) == small
    corpus.write(small, tmp_path / "pack.xz")
    again = corpus.read(tmp_path / "pack.xz")
    assert again == small and again.digest() == small.digest()
    again.parts["cpp/test"].pop()
    assert again.digest() != small.digest()


def test_no_text_is_in_two_parts_and_none_is_left_out_but_what_must_be(small):
    texts = [item for part, items in small.parts.items() if not part.startswith("summaries") for item in items]
    assert len(set(texts)) == len(texts)
    lines = [summary for split in SPLITS for _, summary in small.parts[f"summaries/{split}"]]
    assert len(set(lines)) == len(lines)
    assert sum(len(small.parts[f"cpp/{split}"]) for split in SPLITS) == 4 * 30
    assert sum(len(small.parts[part]) for part in ("pretraining", "pretraining/valid")) == 2 * 40 + 1  # the same.py
    whole = "".join(texts)
    assert "@generated" not in whole and "area_90" not in whole and "area_91" not in whole
    assert not any("namespace" in text for text in small.parts["pretraining"])
    assert sum(row["files"] for row in small.manifest if row["package"] == "alpha") == 30 + 40 + 1
    assert {row["package"] for row in small.manifest if "pretraining" in row["part"]} == {"alpha", "beta"}


def test_held_out_summaries_are_of_other_packages(small):
    by_split = {s: {int(re.search(r"area_(\d+)", code)[1]) // 100 for code, _ in small.parts[f"summaries/{s}"]}
                for s in SPLITS}  # fmt: skip
    assert by_split == {"train": {2}, "valid": {3}, "test": {3}}


def test_a_summary_is_the_docstrings_first_line_and_the_code_has_no_docstring():
    found = list(corpus.summaries(python(7) + "\ndef f():\n    return 1\n"))
    code = "def area_7(radius, scale=7):\n    return scale * math.pi * radius ** 2"
    assert found == [(code, "Return the area of circle number 7.")]
    assert list(corpus.summaries("def f(:\n")) == []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("License-Expression: Apache-2.0 AND MIT", "Apache-2.0 AND MIT"),
        ("Classifier: License :: OSI Approved :: BSD License\nLicense: " + "long " * 90, "BSD License"),
        ("License: MIT", "MIT"),
        ("License-Expression: MIT AND GPL-3.0-only", None),
        ("Classifier: License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)", None),
        ("License: Proprietary", None),
        ("Classifier: Topic :: Software", None),
    ],
)
def test_only_permissive_licences_are_taken(tmp_path, fields, expected):
    folder = tmp_path / "x-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: x\nVersion: 1.0\n{fields}\n")
    assert permissive_licence(importlib.metadata.Distribution.at(folder)) == expected


@pytest.mark.parametrize("text", ["def f(x):\n\treturn  x\r\n", "naïve — 数 🙂", "\x00\x01~", "template<class T>"])
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_tokenizer_has_as_many_tokens_as_asked_for_at_most():
    tokenizer = Tokenizer.from_str(train_tokenizer([python(i) for i in range(20)], 300))
    assert tokenizer.get_vocab_size() <= 300 and tokenizer.token_to_id(END) == 0


def test_the_stream_is_all_texts_each_ended(tokenizer):
    texts = [python(1), cpp(2)]
    assert stream(tokenizer, texts).tolist() == [t for x in texts for t in [*tokenizer.encode(x).ids, 0]]


def test_cpp_items_are_consecutive_windows_of_the_files(tokenizer):
    items = cpp_items(tokenizer, [cpp(1), cpp(2)], TINY, 1000)
    ids = tokenizer.encode(cpp(1)).ids
    mine = [item.tokens for item in items[::2]][:5]
    assert [token for window in mine for token in window] == ids[: 5 * TINY.window]
    assert {len(item.tokens) for item in items} == {TINY.window} and {item.counted for item in items} == {23}
    assert all(a.tokens != b.tokens for a, b in pairwise(items))


def test_a_summarys_item_ends_with_it_whole(tokenizer):
    wide = replace(TINY, window=60)
    items = summary_items(tokenizer, [("def f(x):\n    return x" + " + 1" * 40, "Return x.")], wide, 9)
    [item] = items
    assert len(item.tokens) == 60
    ask = tokenizer.encode(ASK).ids
    assert item.tokens[item.prompt_length :] == [*tokenizer.encode("Return x.").ids, 0]
    assert item.tokens[item.prompt_length - len(ask) : item.prompt_length] == ask


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pretraining.build(TINY)


def test_the_loss_is_the_mean_cross_entropy_of_the_tokens_that_count(model):
    items = [TokenSequence([5, 6, 7, 8, 9], 3), TokenSequence([1, 2, 3], 1)]
    total, right = 0.0, 0
    with torch.no_grad():
        for item in items:  # each by itself, without any filling
            logits = model(input_ids=torch.tensor([item.tokens])).logits[0].double().numpy()
            for place in range(item.prompt_length, len(item.tokens)):
                row = logits[place - 1]
                total += np.log(np.exp(row).sum()) - row[item.tokens[place]]
                right += int(row.argmax() == item.tokens[place])
        assert float(loss_fn(model, collate(items, "cpu"))) == pytest.approx(total / 4, rel=1e-5)
    assert token_accuracy(model, items) == right / 4


def test_pretraining_learns_and_a_saved_model_is_the_same(small, tokenizer, tmp_path):
    torch.manual_seed(0)
    tokens, size = stream(tokenizer, small.parts["pretraining"]), replace(TINY, steps=60, rate=1e-2)
    fresh = pretraining.build(size)
    first = pretraining.held_out_loss(fresh, tokens, size, "cpu")
    assert first == pytest.approx(math.log(size.vocabulary), rel=0.02)
    record = pretraining.pretrain(fresh, tokens, size, "cpu")
    assert record["steps"] == 60 and record["tokens"] == 60 * 4 * 32
    assert pretraining.held_out_loss(fresh, tokens, size, "cpu") < first - 1
    pretraining.save(fresh, record, tmp_path / "m.pt")
    again, found = pretraining.load(size, tmp_path / "m.pt")
    assert found == record
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fresh.parameters(), strict=True))


@pytest.fixture
def setup(monkeypatch, small, model, tmp_path):
    monkeypatch.setitem(SIZES, "tiny", TINY)
    corpus.write(small, tmp_path / "pack.xz")
    pretraining.save(model, {}, tmp_path / "m.pt")
    return runs.Setup("tiny", tmp_path / "pack.xz", tmp_path / "m.pt", "cpp", "cpu")


def test_a_run_begins_where_the_pretrained_model_is(setup):
    """LoRA changes nothing at first; LoRA-One in one pass and deferred have seen the same data as it has."""
    task, found = runs.opened(setup), {}
    for name in ("full fine-tuning", "LoRA", "LoRA-One, deferred"):
        found[name] = runs.train(task, WHO[name], TINY.rank, 1e-2, 3, steps=2).losses
    with torch.no_grad():
        base = float(task.loss_fn(task.base, next(task.training_batches(3))))
    assert [losses[0] for losses in found.values()] == pytest.approx([base] * 3, rel=1e-3)
    assert len({losses[1] for losses in found.values()}) > 1


def test_a_compared_run_tells_thinned_losses_and_its_time_only_if_alone(setup):
    alone = runs.compare(setup, TODAY, 1e-2, 10, alone=True)
    together = runs.compare(setup, TODAY, 1e-2, 10, alone=False)
    assert len(alone["losses"]) == 3  # of 12 steps, by fives
    assert alone["losses"] == together["losses"] and alone["test_loss"] == together["test_loss"]
    assert "seconds_train" in alone and "seconds_train" not in together
    assert runs.compare(setup, TODAY, 1e-2, 10, alone=True, deadline=0.0) is None


def test_the_search_ends_between_two_worse_rates_and_asks_for_no_run_twice(setup, monkeypatch):
    asked = []

    def made_up_run(task, contender, rank, rate, seed, on):
        asked.append(rate)
        return {"valid_loss": math.log(rate / 1.6e-4) ** 2}

    monkeypatch.setattr(runs, "run", made_up_run)
    rows = runs.choose(setup, "LoRA", [], math.inf)
    assert chosen_rate(rows, TINY.choice_seeds) == 1.5e-4
    assert {1e-4, 2e-4} < set(asked) and len(set(asked)) == len(asked)
    assert runs.choose(setup, "LoRA", rows, 0.0) == rows and len(asked) == len(rows)
    assert runs.choose(setup, "LoRA", [], 0.0) == []


def test_a_rate_at_which_a_run_diverges_is_left_by_the_search(setup, monkeypatch):
    def made_up_run(task, contender, rank, rate, seed, on):
        if rate > 1e-3:
            raise torch.linalg.LinAlgError("no singular values")
        return {"valid_loss": -rate}

    monkeypatch.setattr(runs, "run", made_up_run)
    rows = runs.choose(setup, "LoRA", [], math.inf)  # whose first rate is 3e-3
    assert chosen_rate(rows, TINY.choice_seeds) == 1e-3
    assert chosen_rate([r for r in rows if r["rate"] > 1e-3], TINY.choice_seeds) is None


def test_a_task_wants_a_batch_of_each_split(small, model):
    parts = small.parts | {"cpp/valid": small.parts["cpp/valid"][:0]}
    with pytest.raises(ValueError, match="too few items of cpp for valid"):
        make_task("cpp", replace(small, parts=parts), model, TINY, "cpu")
