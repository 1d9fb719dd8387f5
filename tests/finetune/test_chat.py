"""Which tokens of a conversation count in the loss: the same as in TRL, and the same whatever the way to them."""

import json
from importlib.resources import files

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lora_one import demo
from lora_one.errors import DataError
from lora_one.finetune import template
from lora_one.finetune.data import Example, read_examples
from lora_one.finetune.datasets import Rows
from lora_one.finetune.encoding import encode, encode_prompt
from lora_one.finetune.source import Source
from lora_one.finetune.tuners.loading import load_tuner

ENDS = {"qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "phi3": "<|end|>"}
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "yes what"},
    {"role": "user", "content": "sort: dcba"},
    {"role": "assistant", "content": "abcd"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
CALLS = [
    {"role": "user", "content": "one and two"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "ok"},
]


def tokenizer_of(family: str):
    """The demo's tokenizer with the chat template of a family of models, and the tokens that its turns end with."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    tokenizer.chat_template = (files("trl") / "chat_templates" / f"{family}.jinja").read_text()
    end = ENDS[family.removesuffix("_training")]
    specials = ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens({"eos_token": end, "additional_special_tokens": specials})
    return tokenizer


def trl_labels(tokenizer, messages, tools):
    """The labels that TRL trains on."""
    row = {"messages": [messages], **({"tools": [json.dumps(tools)]} if tools else {})}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(demo.MODEL),
        SFTConfig(assistant_only_loss=True, max_length=None, report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_dict(row),
        processing_class=tokenizer,
    )
    (ids,), (labels,) = trainer.train_dataset["input_ids"], trainer.train_dataset["labels"]
    return list(ids), list(labels)


def example_of(messages, tools=(), **fields):
    return Example(
        messages[:-1], messages[-1]["content"], "x, line 1", answer=messages[-1], tools=list(tools), **fields
    )


def learnt(tokenizer, sequence):
    """The text of the tokens that count, a line for each run of them."""
    text = "".join(tokenizer.decode([x]) if x != -100 else "\0" for x in sequence.labels)
    return [run for run in text.split("\0") if run]


@pytest.mark.feature("Chat data", "torch")
@pytest.mark.parametrize(
    ("family", "messages", "tools"),
    [
        ("llama3", TALK, []),
        ("qwen2_5_training", CALLS, TOOLS),  # {% generation %} in the template itself
        ("qwen3", TALK, []),  # its own template rewrites earlier turns: TRL's training template is used
        ("phi3", TALK, []),  # so does this one
    ],
)
def test_the_labels_are_trls(family, messages, tools):
    tokenizer = tokenizer_of(family)
    sequence = encode(tokenizer, example_of(messages, tools))
    ids, labels = trl_labels(tokenizer, messages, tools)
    assert sequence.tokens == ids
    assert sequence.labels == labels


def test_trls_labels_but_for_line_breaks_that_the_model_never_writes():
    """Qwen 2.5: TRL counts the line break of the prompt before an answer, and the one after its end."""
    tokenizer = tokenizer_of("qwen2_5")
    sequence = encode(tokenizer, example_of(CALLS, TOOLS))
    ids, labels = trl_labels(tokenizer, CALLS, TOOLS)
    assert sequence.tokens == ids
    others = [theirs for ours, theirs in zip(sequence.labels, labels, strict=True) if ours != theirs]
    assert tokenizer.decode(others) == "\n" * 6
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
    assert learnt(tokenizer, sequence) == [call, "three<|im_end|>", "ok<|im_end|>"]


def test_what_counts_can_be_the_last_answer_or_everything():
    tokenizer = tokenizer_of("qwen3")  # rewrites earlier turns, which does not matter here
    example = example_of(TALK)
    assert learnt(tokenizer, encode(tokenizer, example, "last_answer")) == ["<think>\n\n</think>\n\nabcd<|im_end|>"]
    whole = encode(tokenizer, example, "everything")
    assert whole.labels == [-100, *whole.tokens[1:]]
    assert whole.tokens == encode(tokenizer, example, "last_answer").tokens


def test_a_template_that_rewrites_earlier_turns_and_the_remedies(monkeypatch):
    monkeypatch.setattr(template, "_training_template", lambda tokenizer: None)  # as without TRL
    tokenizer = tokenizer_of("qwen3")
    with pytest.raises(
        DataError, match=r"^x, line 1: .* in message 3 once more .* install trl, .* --loss-on last_answer"
    ):
        encode(tokenizer, example_of(TALK))
    assert learnt(tokenizer, encode(tokenizer, example_of(TALK[1:3]))) == ["<think>\n\n</think>\n\nyes what<|im_end|>"]


def test_a_greeting_before_the_first_question_is_no_answer():
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    sequence = encode(tokenizer, example_of([{"role": "assistant", "content": "hi"}, *TALK[1:3]]))
    assert learnt(tokenizer, sequence) == [f"yes what{tokenizer.eos_token}"]


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path)


def test_prompt_and_completion_go_through_the_template_where_there_is_one(tmp_path):
    """As strings, and as lists of messages, of which the completion counts: TRL's conversational form."""
    tokenizer = tokenizer_of("llama3")
    strings, lists, talk, text = written(
        tmp_path,
        {"prompt": "hello", "completion": "yes what"},
        {"prompt": TALK[:4], "completion": TALK[4:]},
        {"messages": TALK[1:3]},
        {"text": "hello"},
    )
    assert encode(tokenizer, strings) == encode(tokenizer, talk)
    assert encode_prompt(tokenizer, strings) == encode_prompt(tokenizer, talk)
    assert learnt(tokenizer, encode(tokenizer, lists)) == ["abcd<|eot_id|>"]
    assert encode(tokenizer, lists).tokens == encode(tokenizer, example_of(TALK)).tokens
    as_written = encode(tokenizer, strings, chat_template=False)
    ends = tokenizer.encode("yes what", add_special_tokens=False)
    assert as_written.tokens == [*tokenizer.encode("hello"), *ends, tokenizer.eos_token_id]
    assert encode(tokenizer, text).tokens[-2:] == [*tokenizer.encode("hello")[-1:], tokenizer.eos_token_id]
    tokenizer.chat_template = None
    assert encode(tokenizer, strings) == as_written


def test_a_data_sets_conversations_and_their_tools_go_through_the_template(tmp_path):
    """In a column, each message has the keys of all messages, with None where it has none."""
    rows = [{"talk": CALLS, "tools": json.dumps(TOOLS)}, {"talk": TALK, "tools": None}]
    (tmp_path / "set").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    first, second = Rows(Source(path=str(tmp_path / "set"), conversation="talk"))
    tokenizer = tokenizer_of("qwen2_5")
    assert encode(tokenizer, first) == encode(tokenizer, example_of(CALLS, TOOLS))
    assert encode(tokenizer, second) == encode(tokenizer, example_of(TALK))


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.feature("Chat data", name)) for name in ("jax", "mlx")]
)
def test_the_loss_of_a_conversation_is_torchs(backend):
    losses = []
    for name in ("torch", backend):
        tuner = load_tuner(name).open_tuner(demo.MODEL, "float32", "cpu")
        sequences = [encode(tuner.tokenizer, example_of(messages)) for messages in (TALK, TALK[:3])]
        assert sum(map(len, learnt(tuner.tokenizer, sequences[0]))) == len("yes whatabcd") + 2 * len(
            tuner.tokenizer.eos_token
        )
        losses.append(tuner.mean_loss(tuner.batches(sequences, 2)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
