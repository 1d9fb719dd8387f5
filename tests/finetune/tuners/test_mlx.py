"""The command on MLX, beneath its terminal: data, loss, training and greedy decoding."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate

import lora_one
from lora_one import demo
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import TokenSequence, encode, encode_prompt
from lora_one.finetune.job import finetune
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.tuners.loading import load_tuner
from tests.finetune.tuners.test_all import Diary


@pytest.fixture
def tuner():
    return load_tuner("mlx").open_tuner(demo.MODEL, "float32", None)


def test_the_loss_counts_what_comes_after_the_prompt_and_no_padding(tuner):
    sequences = [TokenSequence([1, 5, 9, 17, 6, 2], 3), TokenSequence([1, 8, 30, 2], 2), TokenSequence([7, 9, 11], 0)]
    (batch,) = tuner.batches(sequences, 3)
    losses = []
    for sequence in sequences:
        logits = np.array(tuner.model(mx.array([sequence.tokens])))[0].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        first = max(sequence.prompt_length, 1)
        losses += [-log_p[i - 1, sequence.tokens[i]] for i in range(first, len(sequence.tokens))]
    assert tuner.loss_fn(tuner.model, batch).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_greedy_decoding_is_mlx_lms(tuner):
    prompts = ["sort:krkt=", "sort:ab=", "sort:yjnjq=", "rev:abc="]
    tokens = [encode_prompt(tuner.tokenizer, example) for example in map(_example, prompts)]
    answers = tuner.generate(tokens, max_new_tokens=6)
    for prompt, answer in zip(tokens, answers, strict=True):
        expected = generate(tuner.model, tuner.tokenizer, prompt, max_tokens=6)
        assert tuner.tokenizer.decode(answer, skip_special_tokens=True) == expected.removesuffix("<eos>")


def _example(prompt):
    from lora_one.finetune.data import Example

    return Example(prompt, "x", "here")


def test_training_is_seeded_takes_every_step_and_lowers_the_loss(tuner, tmp_path, capsys):
    sequences = [encode(tuner.tokenizer, example) for example in read_examples(demo.TRAIN)[:32]]
    recipe = Recipe(
        backend="mlx",
        steps=12,
        batch_size=8,
        learning_rate=1e-2,
        warmup=2,
        precondition=True,
        reg=1e-2,
        out=str(tmp_path),
    )
    runs = []
    for _ in range(2):
        again = load_tuner("mlx").open_tuner(demo.MODEL, "float32", "cpu")
        config = lora_one.Config(rank=4, passes=2)
        again.model, _ = lora_one.init(again.model, again.batches(sequences[:8], 8), again.loss_fn, config)
        losses = []
        again.train(sequences, recipe, lambda step, loss, losses=losses: losses.append((step, loss)))
        runs.append(losses)
    assert runs[0] == runs[1]
    assert [step for step, _ in runs[0]] == list(range(1, 13))
    assert runs[0][-1][1] < runs[0][0][1] - 1
    assert capsys.readouterr().out == ""
    assert not again.model.training


@pytest.mark.parametrize("plain", [False, True])
def test_the_whole_job(plain, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "copy:ab=", "completion": "abc"}, {"prompt": "copy:bc=", "completion": "bcd"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        model=str(demo.MODEL),
        data=str(data),
        test=str(data),
        backend="mlx",
        steps=15,
        batch_size=2,
        learning_rate=1e-2,
        plain=plain,
        out=str(tmp_path / "out"),
        config=lora_one.Config(rank=4, passes=2),
    )
    progress = Diary()
    outcome = finetune(recipe, progress)
    assert progress.scores["before"] == 0.0
    assert (outcome.report is None) == plain
    if not plain:
        assert progress.scores["after"] == 1.0
        assert outcome.losses[-1] < 0.1
    model = load_tuner("mlx").open_tuner(demo.MODEL, "float32", None).model
    lora_one.load(model, tmp_path / "out")


def test_what_is_no_model_is_an_error(tmp_path):
    open_tuner = load_tuner("mlx").open_tuner
    with pytest.raises(lora_one.errors.ModelError, match="must be a model folder"):
        open_tuner(tmp_path, "float32", None)
    (tmp_path / "config.json").write_text('{"model_type": "nothing_like_it"}')
    with pytest.raises(lora_one.errors.ModelError, match="a causal language model that mlx-lm knows"):
        open_tuner(tmp_path, "float32", None)
    with pytest.raises(lora_one.errors.ModelError, match='"cpu" or "gpu" for MLX, got \'cuda\''):
        open_tuner(demo.MODEL, "float32", "cuda")
