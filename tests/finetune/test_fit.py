"""What does not fit between data, tokenizer, model and folder is found before the work, on every backend."""

import json

import pytest
import torch
from safetensors.torch import load, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_one import api
from lora_one.errors import ConfigError, DataError, ModelError
from lora_one.finetune import preparation
from lora_one.finetune.encoding import encode
from lora_one.finetune.evaluation.held_out import open_held_out
from lora_one.finetune.job import finetune, initialize_only
from lora_one.finetune.preparation import open_examples, prepare
from lora_one.finetune.recipe import make_recipe
from lora_one.finetune.tuners.loading import load_tuner
from tests.finetune.tuners.test_all import BACKENDS, Diary

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def make_tokenizer(words=60, **special):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(words - 3)}}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>", **special)


def make_folder(path, rows=60, kind="llama", **special):
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_positions": 16, "n_ctx": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=rows, **sizes, **ends))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, max_position_embeddings=16, **sizes))
    model.save_pretrained(path)
    make_tokenizer(**special).save_pretrained(path)
    return path


def as_published(path):
    """GPT-2's own checkpoint has no prefix before its names, and mlx-lm reads that one."""
    file = path / "model.safetensors"
    tensors = load(file.read_bytes())  # not mapped: the file is written again
    save_file({name.removeprefix("transformer."): x for name, x in tensors.items()}, file, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    eos = {"eos_token": "</s>"}
    return {
        "good": make_folder(path / "good", **eos),
        "short": make_folder(path / "short", kind="gpt2", **eos),
        "short, mlx": as_published(make_folder(path / "published", kind="gpt2", **eos)),
        "small": make_folder(path / "small", rows=40, **eos),
        "padded": make_folder(path / "padded", rows=59, pad_token="w56", **eos),  # the last token has no row
        "endless": make_folder(path / "endless"),
    }


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(length, first=0):
    return {"prompt": " ".join(f"w{first + i % 9}" for i in range(length)), "completion": "w1 w2"}


def recipe(backend, folder, data, **settings):
    paths = {"model": str(folder), "data": data, "out": settings.pop("out", "unused")}
    return make_recipe({"backend": backend, "batch_size": 2, "rank": 2, "passes": 2, **paths, **settings})


def refused(monkeypatch, *of, error=DataError):
    def unreachable(*args, **kwargs):
        raise AssertionError("the work had begun")

    monkeypatch.setattr(api, "init", unreachable)
    with pytest.raises(error) as caught:
        finetune(recipe(*of), Diary())
    return str(caught.value)


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_without_a_row_is_named_by_its_line(backend, folders, tmp_path, monkeypatch):
    """JAX and MLX would go on, with numbers from nowhere."""
    data = write(tmp_path / "d.jsonl", row(5), row(5), row(5, first=40))
    text = refused(monkeypatch, backend, folders["small"], data)
    assert text.startswith("d.jsonl, line 3: token 47 ('w44') is not one of the model's 40: the tokenizer has 60; use")
    assert "model.resize_token_embeddings(60)" in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_so_are_test_and_validation_items(backend, folders, tmp_path, monkeypatch):
    data = tmp_path / "set"
    data.mkdir()
    write(data / "train.jsonl", row(5))
    test = write(tmp_path / "test.jsonl", row(5), row(5, first=40))
    monkeypatch.setattr(api, "init", None)
    with pytest.raises(DataError, match=r"test.jsonl, line 2: token 47"):
        finetune(recipe(backend, folders["small"], str(data), test=test), Diary())
    write(data / "valid.jsonl", row(5, first=40))
    with pytest.raises(DataError, match=r"valid.jsonl, line 1: token 47"):
        finetune(recipe(backend, folders["small"], str(data)), Diary())


@pytest.mark.parametrize(("backend", "name"), [("torch", "short"), ("mlx", "short, mlx")])
def test_a_sequence_beyond_the_models_positions_and_the_remedy(backend, name, folders, tmp_path, monkeypatch):
    data = write(tmp_path / "d.jsonl", row(5), row(14))  # with completion and end: 17
    text = refused(monkeypatch, backend, folders[name], data)
    assert text.startswith("d.jsonl, line 2: the sequence must be at most 16 tokens long, the positions that the model")
    assert "got 17: max_length 16 (on the command line --max-length 16), or less, cuts it" in text
    monkeypatch.undo()
    outcome = initialize_only(recipe(backend, folders[name], data, max_length=16, out=str(tmp_path / "o")), Diary())
    assert len(outcome.report.layers) == 4


@pytest.mark.parametrize(("backend", "name"), [("torch", "short"), ("mlx", "short, mlx")])
def test_a_question_whose_answer_has_no_place(backend, name, folders, tmp_path, monkeypatch):
    """Answers may be one token longer than the longest that is right; the last token of one is not fed again."""
    data, test = write(tmp_path / "d.jsonl", row(5)), tmp_path / "t.jsonl"
    long = {"prompt": "w1", "completion": " ".join(["w2"] * 5)}
    monkeypatch.setattr(api, "init", None)
    with pytest.raises(DataError, match=r"t.jsonl, line 1: the prompt and the longest answer must have .* 16 .*17"):
        finetune(recipe(backend, folders[name], data, test=write(test, row(11), long)), Diary())
    tuner = load_tuner(backend).open_tuner(folders[name], "float32", None)
    write(test, row(10), long)  # fits
    asked = recipe(backend, folders[name], data, test=str(test))
    questions = open_held_out(asked, tuner, list(open_examples(str(test)))).questions
    answers = tuner.generate([q.tokens[: q.prompt_length] for q in questions], max_new_tokens=7)
    assert all(len(answer) <= 7 for answer in answers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_longer_than_it_was_trained_on_is_a_remark_where_positions_rotate(backend, folders, tmp_path):
    data = write(tmp_path / "d.jsonl", row(5), row(14), row(20))
    diary = Diary()
    prepare(recipe(backend, folders["good"], data), diary)
    (text,) = [text for text in diary.warnings if "longer" in text]
    assert text == (
        "2 of 3 sequences are longer than the 16 tokens that the model was made for; the longest is d.jsonl, line 3 "
        "with 23: max_length cuts them"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tokenizer_that_ends_nothing(backend, folders, tmp_path, monkeypatch):
    data = write(tmp_path / "d.jsonl", row(5))
    text = refused(monkeypatch, backend, folders["endless"], data, error=ModelError)
    assert "endless: the tokenizer must have an end-of-sequence token" in text
    assert '"eos_token" in tokenizer_config.json' in text


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_padding_token_without_a_row_is_not_needed(backend, folders, tmp_path):
    """Llama's classic: a [PAD] added to the tokenizer, the model as it was. What pads is masked, whatever it is."""
    sequences = {}
    for name in ("good", "padded"):
        tuner = load_tuner(backend).open_tuner(folders[name], "float32", None)
        (batch,) = tuner.batches([encode(tuner.tokenizer, x) for x in examples(tmp_path)], 2)
        sequences[name] = batch["input_ids"].tolist()
        assert max(map(max, sequences[name])) < 59
    assert sequences["good"] == sequences["padded"]


def examples(tmp_path):
    return list(open_examples(write(tmp_path / "p.jsonl", row(3), row(6))))


@pytest.mark.parametrize("job", [initialize_only, finetune])
@pytest.mark.parametrize("out", ["file", "file/below", "nul\0l", "x" * 300])
def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(job, out, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("here")
    monkeypatch.setattr(preparation, "load_tuner", None)
    with pytest.raises(ConfigError, match="out must be a folder that can be written, got "):
        job(recipe("torch", "m", "d.jsonl", out=str(tmp_path / out)), Diary())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_tried_leaves_nothing_behind(tmp_path):
    with pytest.raises(DataError):
        initialize_only(recipe("torch", "m", "none.jsonl", out=str(tmp_path / "a/b/c")), Diary())
    assert list(tmp_path.iterdir()) == []
