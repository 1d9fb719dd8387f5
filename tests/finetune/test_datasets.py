"""Data sets through `datasets`: which rows, which words, which errors."""

import json

import datasets
import pytest
from PIL import Image

from lora_one.errors import BackendError, ConfigError, DataError
from lora_one.finetune.datasets import Rows, require
from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.source import Source, make_source

ROWS = [
    {"kind": "math", "question": "1+1", "hint": "", "answer": "It is 2.\nEnd", "label": 0},
    {"kind": "prose", "question": "2+2", "hint": "even", "answer": "Sorry", "label": 1},
    {"kind": "math", "question": "3+3", "hint": "also even", "answer": "no end", "label": 2},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in the hub's simplest layout: files named after their splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list(ROWS).to_json(tmp_path / "set/train.jsonl")
    datasets.Dataset.from_list(ROWS[:1]).to_json(tmp_path / "set/test.jsonl")
    return str(tmp_path / "set")


def read(folder, **settings):
    plain = {"prompt": "{question}", "completion": "{answer}"}
    return [(e.prompt, e.completion) for e in Rows(make_source({"path": folder, **plain, **settings}, "data"))]


def test_prompt_and_completion_are_templates_of_columns(folder):
    assert read(folder, prompt="Q: {question}\nA: ")[0] == ("Q: 1+1\nA: ", "It is 2.\nEnd")
    assert len(read(folder, split="test")) == 1
    assert len(read(folder, split="train[:2]")) == 2


def test_rows_are_kept_and_dropped_by_what_is_found_in_a_column(folder):
    assert [q for q, _ in read(folder, keep={"kind": "^math$"})] == ["1+1", "3+3"]
    assert [q for q, _ in read(folder, drop={"answer": "(?i)SORRY|no end"})] == ["1+1"]
    assert [q for q, _ in read(folder, keep={"kind": "math"}, drop={"label": "^2$"})] == ["1+1"]


def test_a_pattern_cuts_the_completion_and_leaves_out_rows_without_it(folder):
    assert read(folder, completion_match=r"(?s)^.*?(?=\nEnd)") == [("1+1", "It is 2.")]


def test_the_first_prompt_whose_columns_are_filled_is_taken(folder):
    found = read(folder, prompt=["{question} ({hint})", "{question}"])
    assert [q for q, _ in found] == ["1+1", "2+2 (even)", "3+3 (also even)"]
    with pytest.raises(DataError, match="row 0: no prompt template fits"):
        read(folder, prompt=["{hint}"])


def test_labels_are_words(folder):
    words = {"label": {0: "zero", "1": "one", 2: "two"}}
    assert [c for _, c in read(folder, completion="{label}", words=words)] == ["zero", "one", "two"]
    with pytest.raises(DataError, match="row 1: label must be one of 0, got 1: drop such rows"):
        read(folder, completion="{label}", words={"label": {0: "zero"}})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompt": "{text}"}, "no columns text; there are kind, question, hint, answer, label"),
        ({"keep": {"subject": "x"}}, "no columns subject"),
        ({"split": "dev"}, r"\(folder\), default, dev: cannot be read"),
        ({"name": "small"}, "small, train: cannot be read"),
        ({"path": "nowhere/to_be_found"}, r"nowhere/to_be_found \(hub name\), default, train: cannot be read"),
    ],
)
def test_data_that_cannot_be_read(folder, settings, match):
    with pytest.raises(DataError, match=match):
        read(**{"folder": folder, **settings}) if "path" not in settings else read(settings["path"])


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"prompt": "{a}"}, "give either prompt and completion, or conversation"),
        ({"prompt": "{a}", "completion": "b", "conversation": "c"}, "give either"),
        ({"conversation": "c", "turns": {"user": "hi"}}, "turns must have a template with {content}"),
        ({"conversation": "c", "turns": {"user": "{content}"}}, "for each role and for the assistant"),
        ({"prompt": "{a}", "completion": "b", "keep": {"a": "("}}, "a regular expression is expected, got '\\('"),
        ({"prompt": "{a}", "completion": "b", "filter": {}}, "data: unknown settings filter; known are completion"),
        ({"prompt": "{a}", "completion": "b", "words": {"a": 1}}, "data: a setting has the wrong type"),
    ],
)
def test_settings_that_cannot_be(values, match):
    with pytest.raises(ConfigError, match=match):
        make_source({"path": "x", **values}, "data")


def test_each_answer_of_a_conversation_is_an_example_with_all_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parts = [{"type": "text", "text": "What?\n"}, {"type": "image", "text": None}]
    talk = [("user", parts), ("assistant", "A cup."), ("user", "And?"), ("assistant", "Tea.")]
    messages = [
        {"role": role, "content": text if isinstance(text, list) else [{"type": "text", "text": text}]}
        for role, text in talk
    ]
    string = datasets.Value("string")
    part = {"type": string, "text": string}
    features = datasets.Features({"talk": [{"role": string, "content": [part]}], "seen": datasets.Image()})
    row = {"talk": messages, "seen": Image.new("L", (4, 3), 7)}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "set/train.parquet")
    turns = {"start": "Hello. ", "user": "U: {content} ", "assistant": "A: {content}</s>", "image": "<image>\n"}
    source = Source(path=str(tmp_path / "set"), conversation="talk", turns=turns, images="seen")
    first, second = Rows(source)
    assert (first.prompt, first.completion) == ("Hello. U: <image>\nWhat? A:", "A cup.")
    assert (second.prompt, second.completion) == ("Hello. U: <image>\nWhat? A: A cup.</s>U: And? A:", "Tea.")
    (picture,) = second.pictures()
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (4, 3), (7, 7, 7))
    with pytest.raises(DataError, match="row 0: turns has no template for the role 'user'"):
        list(Rows(Source(path=source.path, conversation="talk", turns={"assistant": "{content}"})))


def test_tools_and_tool_calls_have_no_place_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    turns = {"user": "U: {content}", "assistant": "A: {content}"}
    talk = [{"role": "user", "content": "q", "tool_calls": None}, {"role": "assistant", "content": "a"}]
    calling = [talk[0], {"role": "assistant", "content": None, "tool_calls": "f()"}]
    for name, row, match in (
        ("tools", {"talk": talk, "tools": "[{}]"}, "row 0: 'tools' have no place in turns"),
        ("calls", {"talk": calling, "tools": ""}, "row 0: 'tool_calls', or a message without content, fits no turn"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=match):
            list(Rows(Source(path=str(tmp_path / name), conversation="talk", turns=turns)))


def test_a_package_that_is_not_there_is_named_with_the_extra():
    with pytest.raises(BackendError, match=r"needs the package 'nonesuch_at_all': pip install 'lora-one\[recipes\]'"):
        require("nonesuch_at_all")


def test_a_sequence_is_cut_where_it_ends_and_in_an_encoder_decoder_on_both_sides():
    sequence = TokenSequence([5, 6, 7, 8, 9], prompt_length=3)
    assert sequence.cut(4) == TokenSequence([5, 6, 7, 8], 3)
    assert sequence.cut(9) == sequence
    assert sequence.cut(3) is None
    assert sequence.cut(3, separate=True) == TokenSequence([5, 6, 8, 9], 2)  # and the encoder's end of sequence
    assert sequence.cut(1, separate=True) == TokenSequence([8], 0)
