"""The embedded model and data are those of their scripts; the model knows its pretraining tasks and no other."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one import demo
from lora_one.demo import tasks
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import encode_prompt
from lora_one.finetune.tuners.torch.opening import open_tuner


@pytest.fixture(scope="module")
def tuner():
    return open_tuner(demo.MODEL, "float32", None)


def score(tuner, items) -> float:
    answers = tuner.generate([tuner.tokenizer.encode(item["prompt"]) for item in items], 20)
    return sum(tuner.tokenizer.decode(a) == i["completion"] for a, i in zip(answers, items, strict=True)) / len(items)


def test_it_is_small():
    assert sum(f.stat().st_size for f in demo.MODEL.iterdir()) < 3 * 2**20
    with safe_open(demo.MODEL / "model.safetensors", framework="pt") as file:
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert 0.8e6 < count < 1.2e6


def test_token_batches_are_what_the_tokenizer_makes_of_the_texts():
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    lines = [json.loads(line) for line in demo.TRAIN.read_text().splitlines()]
    expected = tokenizer("".join(line["prompt"] + line["completion"] + "<eos>" for line in lines)).input_ids
    batches = demo.token_batches(8, 24)
    assert batches.shape[1:] == (8, 24) and 0 <= len(expected) - batches.size < 8 * 24
    assert batches.ravel().tolist() == expected[: batches.size]


def test_it_is_a_plain_llama_that_old_readers_find_rope_theta_in():
    config = json.loads((demo.MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0


@pytest.mark.parametrize("task", tasks.PRETRAIN, ids=lambda task: task.name)
def test_it_has_learnt_its_pretraining_tasks(tuner, task):
    """Score items that it was not trained on."""
    items = list(itertools.islice(task.items("test", 64, seed=9), 64))
    assert score(tuner, items) > 0.9


@pytest.mark.parametrize("folder", [demo.TRAIN.parent, demo.TRAIN.parent / "harder"], ids=["main", "harder"])
def test_it_knows_neither_of_the_fine_tuning_tasks(tuner, folder):
    lines = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    assert score(tuner, lines[:64]) < 0.1


def test_data_is_what_the_script_writes_and_test_items_are_not_in_train(tmp_path):
    tasks.write(tmp_path)
    for name in ("train.jsonl", "test.jsonl", "harder/train.jsonl", "harder/test.jsonl"):
        assert (tmp_path / name).read_text() == (demo.TRAIN.parent / name).read_text()
    for folder in (demo.TRAIN.parent, demo.TRAIN.parent / "harder"):
        train, test = ({e.prompt for e in read_examples(folder / f"{split}.jsonl")} for split in ("train", "test"))
        assert len(test) > 200
        assert not train & test


def test_tokenizer_is_one_token_a_character_and_exact():
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    text = "sort:qz =\nA~"
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert encode_prompt(tokenizer, read_examples(demo.TEST)[0])[0] == tokenizer.encode("s")[0]


def test_pretraining_script_learns(tmp_path):
    """In a few steps of the committed script the loss falls, and the files that it writes open."""
    from benchmarks.embedded_llama import pretrain

    tokenizer = pretrain.write_tokenizer(tmp_path)
    torch.manual_seed(0)
    model = pretrain.build(tokenizer)
    ids, labels = next(pretrain.batches(tokenizer, 64, seed=1))
    before = model(input_ids=ids, labels=labels).loss.item()
    pretrain.train(model, tokenizer, steps=30, seed=0)
    assert model(input_ids=ids, labels=labels).loss.item() < before - 1.0
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
