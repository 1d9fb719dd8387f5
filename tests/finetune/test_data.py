import json
from types import SimpleNamespace

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import AutoTokenizer

from lora_one import demo
from lora_one.errors import DataError
from lora_one.finetune.data import Example, read_examples
from lora_one.finetune.encoding import encode, encode_prompt
from lora_one.finetune.evaluation.held_out import reference

GOOD = {"prompt": "a", "completion": "b"}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_reads_prompts_and_conversations_and_skips_blank_lines(tmp_path):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    examples = read_examples(write(tmp_path / "x.jsonl", GOOD, "", chat))
    assert examples[0] == Example("a", "b", "x.jsonl, line 1")
    assert examples[1] == Example([{"role": "user", "content": "q"}], "a", "x.jsonl, line 3")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_only_a_line_feed_ends_a_line(tmp_path, character):
    """JSON lets these characters stand in a string as they are, and whoever writes with ensure_ascii=False does so."""
    lines = [json.dumps(GOOD), f'{{"prompt": "a{character}b", "completion": "c{character}"}}', json.dumps(GOOD), "{"]
    file = write(tmp_path / "x.jsonl", *lines[:3])
    assert read_examples(file)[1] == Example(f"a{character}b", f"c{character}", "x.jsonl, line 2")
    with pytest.raises(DataError, match="line 4: not JSON"):
        read_examples(write(file, *lines))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_windows_line_ends(tmp_path, end):
    file = tmp_path / "x.jsonl"
    part = "".join(json.dumps(row) + end for row in (GOOD, {"prompt": "", "completion": "\ufeffä"}))
    file.write_bytes(2 * part.encode("utf-8-sig"))  # and two such files put together
    assert [(x.prompt, x.completion, x.where[-1]) for x in read_examples(file)] == [
        ("a", "b", "1"),
        ("", "\ufeffä", "2"),
        ("a", "b", "3"),
        ("", "\ufeffä", "4"),
    ]


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5_000, '{"prompt": "\u0000"}'])
def test_json_that_the_parser_gives_up_on_is_named_by_its_line(tmp_path, line):
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_examples(write(tmp_path / "x.jsonl", GOOD, line))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2: not JSON: .* at column 2"),
        ("[1]", "line 2: must be an object, got list"),
        ({"prompt": "a"}, "line 2: must have 'prompt' and 'completion', or 'messages'; got 'prompt'"),
        ({"text": ""}, "line 2: 'text' must be a string with something in it, got ''"),
        ({"question": "a"}, "line 2: must have .*; got 'question'"),
        ({"prompt": 3, "completion": "b"}, r"line 2: 'prompt' must be a string \(or both lists of messages\), got int"),
        ({"prompt": "a", "completion": ""}, "line 2: 'completion' is empty"),
        ({"messages": "hi"}, "line 2: 'messages' must be a list of at least two"),
        ({"messages": [{"role": "user"}, {}]}, "line 2: a message must have the strings 'role' and 'content'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "line 2: the last message must be the assistant's, got 'user'",
        ),
    ],
)
def test_a_bad_line_is_named_with_the_reason(tmp_path, line, match):
    with pytest.raises(DataError, match=match):
        read_examples(write(tmp_path / "x.jsonl", GOOD, line))


def test_a_folder_is_mlx_lms_layout_and_text_is_learnt_whole(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text('{"text": "sort:ba=ab"}\n')
    (example,) = read_examples(tmp_path)
    assert (example.prompt, example.completion, example.where) == ("", "sort:ba=ab", "train.jsonl, line 1")
    sequence = encode(tokenizer, example)
    whole = tokenizer.encode("sort:ba=ab", add_special_tokens=False)
    assert sequence.tokens[sequence.prompt_length :] == [*whole, tokenizer.eos_token_id]


def test_files_without_examples(tmp_path):
    with pytest.raises(DataError, match="at least one example, got none"):
        read_examples(write(tmp_path / "x.jsonl", ""))
    with pytest.raises(DataError, match=r"nowhere.jsonl cannot be read"):
        read_examples(tmp_path / "nowhere.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path / "b.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.MODEL)


def test_a_sequence_is_prompt_completion_and_end(tokenizer):
    sequence = encode(tokenizer, Example("sort:ba=", "ab", ""))
    assert tokenizer.decode(sequence.tokens[: sequence.prompt_length]) == "sort:ba="
    assert sequence.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(sequence.tokens[sequence.prompt_length : -1]) == "ab"


def test_a_conversation_goes_through_the_chat_template(tokenizer):
    example = Example([{"role": "user", "content": "sort:ba="}], "ab", "")
    assert encode(tokenizer, example) == encode(tokenizer, Example("sort:ba=", "ab", ""))
    assert encode_prompt(tokenizer, example) == tokenizer.encode("sort:ba=")


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<{{ m['role'] }}>"
    "{% if think is defined %}({{ think }}){% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.arguments | tojson }}</call>{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% if think is defined %}({{ think }}){% endif %}{% endif %}"
)
CALL = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}]}
ASK = {"role": "user", "content": "1+1?"}


@pytest.fixture
def chatting(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def conversation(tmp_path, **row):
    (example,) = read_examples(write(tmp_path / "x.jsonl", row))
    return example


@pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS)])
def test_tools_reach_the_template_of_prompt_and_whole(tmp_path, chatting, given):
    messages = [ASK, {"role": "assistant", "content": "2"}]
    example = conversation(tmp_path, messages=messages, tools=given, source="an extra column")
    sequence = encode(chatting, example)
    whole = chatting.apply_chat_template(messages, tools=TOOLS, return_dict=False)
    prompt = chatting.apply_chat_template([ASK], tools=TOOLS, add_generation_prompt=True, return_dict=False)
    assert sequence.tokens == whole
    assert sequence.prompt_length == len(prompt)
    assert encode_prompt(chatting, example) == prompt
    assert encode(TokenizerWrapper(chatting), example) == sequence  # mlx-lm's
    assert encode(chatting, conversation(tmp_path, messages=messages)).tokens != whole
    assert encode(chatting, conversation(tmp_path, messages=messages, tools=[])).tokens == (
        chatting.apply_chat_template(messages, return_dict=False)
    )


def test_tool_calls_and_results_are_part_of_a_conversation(tmp_path, chatting):
    """The form that templates read has arguments as objects; OpenAI's has JSON in a string, which they would quote."""
    result = {"role": "tool", "name": "add", "tool_call_id": "1", "content": [{"type": "text", "text": "2"}]}
    rows = [ASK, {**CALL, "content": None}, result, {"role": "assistant", "content": "It is 2."}]
    example = conversation(tmp_path, messages=rows, tools=TOOLS)
    read = [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"a": 1}}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    assert encode(chatting, example).tokens == chatting.apply_chat_template(read, tools=TOOLS, return_dict=False)
    assert (example.completion, example.answer) == ("It is 2.", None)


def test_an_answer_may_be_a_tool_call(tmp_path, chatting):
    example = conversation(tmp_path, messages=[ASK, CALL], tools=TOOLS)
    sequence = encode(chatting, example)
    ids = sequence.tokens[sequence.prompt_length :]
    assert ids == chatting.encode('<call>{"a": 1}</call></s>', add_special_tokens=False)
    assert reference(SimpleNamespace(tokenizer=chatting), example, sequence) == chatting.decode(
        ids, skip_special_tokens=True
    )


def test_a_rows_own_settings_of_the_template(tmp_path, chatting):
    messages = [ASK, {"role": "assistant", "content": "2"}]
    example = conversation(tmp_path, messages=messages, chat_template_kwargs={"think": "no"})
    assert encode(chatting, example).tokens == chatting.apply_chat_template(messages, think="no", return_dict=False)
    with pytest.raises(DataError, match="line 1: the tokenizer's chat template makes no use of thonk"):
        encode(chatting, conversation(tmp_path, messages=messages, chat_template_kwargs={"thonk": 1}))


def test_a_template_that_makes_no_use_of_tools_or_fails(tmp_path, chatting):
    messages = [ASK, {"role": "assistant", "content": "2"}]
    example = conversation(tmp_path, messages=messages, tools=TOOLS)
    chatting.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="line 1: the tokenizer's chat template makes no use of 'tools': leave them"):
        encode(chatting, example)
    chatting.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match=r"line 1: .* fails on this conversation: TemplateError: no system role here"):
        encode(chatting, example)


def talk(*messages, **row):
    return {"messages": [ASK, *messages], **row}


def call(**function):
    return {"role": "assistant", "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ({**GOOD, "tools": TOOLS}, "'tools' are for the chat template, which only messages go through"),
        ({"text": "a", "tools": TOOLS}, "'tools' are for the chat template"),
        ({**GOOD, "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs' are for the chat template"),
        (talk(CALL, tools={"add": 1}), "'tools' must be a list of schemas .*, got {'add': 1}"),
        (talk(CALL, tools="add"), "'tools' must be a list of schemas .*, got 'add'"),
        (talk(CALL, functions=TOOLS), "'functions' are not read: write them as 'tools'"),
        (talk(CALL, chat_template_kwargs=[1]), "'chat_template_kwargs' must be an object, got"),
        (talk(CALL, chat_template_kwargs={"tokenize": False}), "must leave tokenize to lora-one"),
        (talk({"role": "assistant", "content": None}), "strings 'role' and 'content', or 'tool_calls', got"),
        (talk({"role": "assistant", "content": [{"type": "image"}]}), "'content' must be a string or a list of text"),
        (talk({"role": "assistant", "content": 5}), "'content' must be a string or a list of text parts, got 5"),
        (talk({"role": "assistant", "tool_calls": "add"}), "'tool_calls' must be a list of objects, got 'add'"),
        (talk(call(arguments={})), "a tool call must have a 'function' with a 'name'"),
        (talk(call(name="add", arguments="{a")), "'arguments' of a tool call must be an object, or one as JSON"),
        (talk(call(name="add", arguments=[1])), "'arguments' of a tool call must be an object"),
        ('{"prompt": "\\ud83d", "completion": "b"}', r"'\\ud83d' is half of a surrogate pair"),
    ],
)
def test_rows_for_a_template_that_cannot_be(tmp_path, line, match):
    with pytest.raises(DataError, match=f"^x.jsonl, line 2: .*{match}"):
        read_examples(write(tmp_path / "x.jsonl", GOOD, line))


class Fake:
    """A tokenizer of character codes that can be made difficult."""

    eos_token_id = 0
    chat_template = None

    def __init__(self, closes: bool = False, template=None):
        self.closes = closes
        if template:
            self.chat_template = "yes"
            self.template = template

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text] + ([0] if self.closes and add_special_tokens else [])

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, return_dict):
        return [ord(c) for c in self.template(messages)]


def test_an_end_token_that_the_tokenizer_adds_to_the_prompt_is_taken_off():
    sequence = encode(Fake(closes=True), Example("ab", "c", ""))
    assert sequence.tokens == [97, 98, 99, 0]
    assert sequence.prompt_length == 2


def test_chat_without_a_template_or_with_one_that_rewrites_the_prompt():
    example = Example([{"role": "user", "content": "q"}], "a", "x.jsonl, line 7")
    with pytest.raises(DataError, match="line 7: 'messages' need a tokenizer with a chat template"):
        encode(Fake(), example)
    with pytest.raises(DataError, match="line 7: the tokenizer's chat template must render"):
        encode(Fake(template=lambda messages: f"{len(messages)}"), example)
