"""The tiny T5 is what its script makes, and knows what the fine-tuning task builds on."""

import pytest
import torch
from safetensors import safe_open

from benchmarks.quality.tasks import t5_top
from benchmarks.t5 import pretrain
from lora_one.demo.tasks import PRETRAIN


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.open_tokenizer()


def items(name: str, count: int) -> list[tuple[str, str]]:
    task = next(task for task in PRETRAIN if task.name == name)
    return [(item["prompt"], item["completion"]) for item in task.items("test", count, seed=9)]


def test_committed_weights_are_small_and_of_the_scripts_shapes(tokenizer):
    assert (pretrain.MODEL / "model.safetensors").stat().st_size < 2e6
    expected = {name: tuple(value.shape) for name, value in pretrain.build(tokenizer).state_dict().items()}
    with safe_open(pretrain.MODEL / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            assert file.get_tensor(key).dtype == torch.bfloat16
            assert tuple(file.get_slice(key).get_shape()) == expected[key]


def test_it_knows_the_largest_letter_and_not_yet_in_upper_case(tokenizer):
    model = pretrain.open_model()
    assert pretrain.exact_match(model, tokenizer, items("max", 128)) > 0.6
    task = t5_top()
    assert task.score(model, task.test[:64]) < 0.1
    assert {prompt for prompt, _ in task.test}.isdisjoint(prompt for prompt, _ in (*task.train, *task.valid))


def test_exact_match_is_equality_of_the_decoded_text(tokenizer):
    model, asked = pretrain.open_model(), [*items("max", 16), *items("dbl", 8), *items("min", 16)]
    right = 0
    for prompt, completion in asked:
        source = tokenizer(prompt + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        answer = model.generate(input_ids=source, max_new_tokens=16, do_sample=False)[0, 1:].tolist()
        end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else None
        right += end is not None and tokenizer.decode(answer[:end]) == completion
    assert 0 < right < len(asked)
    assert pretrain.exact_match(model, tokenizer, asked) == pytest.approx(right / len(asked))


def test_the_script_learns(tokenizer):
    torch.manual_seed(0)
    model = pretrain.build(tokenizer)
    batch = next(pretrain.stream(tokenizer, 64, seed=1))
    before = float(model(**batch).loss)
    pretrain.train(model, tokenizer, steps=20, seed=0)
    assert float(model(**batch).loss) < 0.5 * before
