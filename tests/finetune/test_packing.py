"""Packed rows have the loss of their examples, on every framework, and models that mix them up are refused."""

import json
import random
from unittest.mock import Mock

import pytest
from datasets import Dataset
from mlx_lm.models import mamba
from trl import pack_dataset

from lora_one.errors import ConfigError
from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.packing import check_apart, join, pack
from lora_one.finetune.preparation import prepare
from lora_one.finetune.recipe import make_recipe
from lora_one.finetune.tuners.loading import load_tuner
from tests.finetune.recipes.standins import make_t5
from tests.finetune.test_fit import as_published, make_folder

BACKENDS = [pytest.param(name, marks=pytest.mark.feature("Packing", name)) for name in ("torch", "jax", "mlx")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"), eos_token="</s>")


def open_tuner(backend, folder):
    return load_tuner(backend).open_tuner(folder, "float32", "cpu")


@pytest.fixture(scope="module")
def sequences():
    """24 examples of 5 to 12 tokens."""
    generator = random.Random(0)
    lengths = [generator.randrange(5, 13) for _ in range(24)]
    return [TokenSequence([generator.randrange(3, 60) for _ in range(n)], generator.randrange(1, 4)) for n in lengths]


def test_rows_are_as_full_as_trls(sequences):
    rows = pack(sequences, 40)
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [s.tokens for s in sequences]}), 40, "bfd")
    assert sorted(len(row.tokens) for row in rows) == sorted(map(len, theirs["input_ids"]))
    parts = [tokens for row in rows for tokens in split(row)]
    assert sorted(parts) == sorted(sequence.tokens for sequence in sequences)
    assert sum(row.counted for row in rows) == sum(sequence.counted for sequence in sequences)


def split(row):
    starts = [sum(row.lengths[:index]) for index in range(len(row.lengths))]
    return [row.tokens[start : start + length] for start, length in zip(starts, row.lengths, strict=True)]


def test_positions_begin_anew_and_nothing_predicts_an_examples_first_token():
    row = join([TokenSequence([5, 6, 7], 0), TokenSequence([8, 9], 1), TokenSequence([4, 3, 2], 0)])
    assert row.position_ids == [0, 1, 2, 0, 1, 0, 1, 2]
    assert row.labels == [-100, 6, 7, -100, 9, -100, 3, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_packed_rows_is_that_of_their_examples(backend, folder, sequences):
    """The rows are padded to equal widths, and the mean is over the tokens of all."""
    tuner = open_tuner(backend, folder)
    rows = pack(sequences[:7], 30)
    assert max(len(row.lengths) for row in rows) > 1
    (packed,) = tuner.batches(rows, len(rows))
    alone = tuner.mean_loss(tuner.batches(sequences[:7], 7))
    assert tuner.mean_loss([packed]) == pytest.approx(alone, abs=1e-5)
    check_apart(lambda rows: tuner.mean_loss(tuner.batches(rows, 1)), rows)


def test_an_example_that_sees_its_neighbour_is_found(folder):
    """transformers takes a mask to say that a row is one text."""
    tuner = open_tuner("torch", folder)
    rows = [join([TokenSequence([5, 6, 7], 1), TokenSequence([8, 9, 4], 1)])]

    def mixed(rows):
        (batch,) = tuner.batches(rows, 1)
        return tuner.mean_loss([{**batch, "attention_mask": batch["input_ids"] * 0 + 1}])

    with pytest.raises(ConfigError, match="an example's loss changes with its neighbour: leave packing out"):
        check_apart(mixed, rows)


def refusal(tmp_path, backend, folder):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "w1 w2"}) + "\n")
    settings = {"model": str(folder), "data": str(data), "backend": backend, "packing": True, "max_length": 8}
    with pytest.raises(ConfigError) as caught:
        prepare(make_recipe(settings), Mock())
    return str(caught.value)


def test_models_that_cannot_keep_examples_apart(folder, tmp_path):
    make_t5(tmp_path / "t5")
    assert "a causal language model of text alone" in refusal(tmp_path, "torch", tmp_path / "t5")
    gpt2 = as_published(make_folder(tmp_path / "gpt2", kind="gpt2", eos_token="</s>"))
    assert "a table of positions" in refusal(tmp_path, "mlx", gpt2)
    packed = make_recipe({"packing": True, "max_length": 8})
    tuner = open_tuner("torch", folder)
    tuner.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="eager or sdpa, got 'flash_attention_2'"):
        tuner.check(packed)
    tuner = open_tuner("mlx", folder)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "state_size": 4, "num_hidden_layers": 1, "conv_kernel": 2}
    flags = {"use_bias": False, "use_conv_bias": False, "time_step_rank": 1}
    tuner.model = mamba.Model(mamba.ModelArgs(model_type="mamba", vocab_size=9, **sizes, **flags))
    with pytest.raises(ConfigError, match=r"layers with a state \(\w+Cache\), which runs on"):
        tuner.check(packed)
