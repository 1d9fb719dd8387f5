"""Configuration files and data of any content are read, or refused by our own error."""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

import lora_one
from lora_one.errors import ConfigError, DataError, LoraOneError
from lora_one.finetune.data import read_examples
from lora_one.finetune.recipe import Recipe, make_recipe, read_recipe
from tests.fuzz.inputs import DAMAGE, DEEP, LONG, TEXTS, VALUES, damaged, examples

NAMES = [*Recipe.__dataclass_fields__, *lora_one.Config.__dataclass_fields__, "notes", "no such setting"]
SOURCES = ["path", "split", "prompt", "completion", "keep", "words", "turns", "conversation", "max_tokens", "images"]
SETTINGS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4) | st.fixed_dictionaries(
    {"data": st.dictionaries(st.sampled_from(SOURCES), VALUES, max_size=5)}
)
YAML = b"rank: 8\nlearning_rate: 2e-4\ntargets: [q_proj, v_proj]\ndata: {path: x, prompt: '{a}', completion: '{b}'}\n"
TOML = b'rank = 8\nlearning_rate = 2e-4\ntargets = ["q_proj"]\nout = "runs"\n[data]\npath = "x"\n'
LAUGHS = b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 122))


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read(file: Path) -> None:
    with contextlib.suppress(ConfigError):
        make_recipe(read_recipe(file))


@examples(800)
@given(st.sampled_from([(YAML, "yaml"), (TOML, "toml")]), DAMAGE)
@example((LAUGHS, "yaml"), ([], b""))
@example((b"data: " + DEEP.encode(), "yaml"), ([], b""))
@example((b"data = " + DEEP.encode(), "toml"), ([], b""))
@example((b"rank = " + LONG.encode(), "toml"), ([], b""))
def test_damaged_recipes(folder, base, damage):
    text, kind = base
    (folder / f"recipe.{kind}").write_bytes(damaged(text, damage))
    read(folder / f"recipe.{kind}")


@examples(800)
@given(SETTINGS.filter(lambda settings: "\ud800" not in repr(settings)))
def test_recipes_of_any_settings(folder, settings):
    (folder / "any.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8", errors="replace")
    read(folder / "any.yaml")


@examples(400)
@given(st.dictionaries(st.sampled_from(list(lora_one.Config.__dataclass_fields__)), VALUES, max_size=4))
def test_configs_of_any_values(values):
    with contextlib.suppress(LoraOneError):
        lora_one.Config.from_dict(values)


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ({"prompt": "a", "completion": "b"}, {"messages": TURNS}))
MESSAGES = st.dictionaries(st.sampled_from(["role", "content", "x"]), TEXTS | VALUES, max_size=3)
ROWS = st.dictionaries(
    st.sampled_from(["prompt", "completion", "messages", "text", "tools", "role"]),
    VALUES | st.lists(MESSAGES, max_size=3),
    max_size=4,
)


@examples(2000)
@given(DAMAGE, st.lists(ROWS | VALUES, max_size=2))
@example(([], DEEP.encode()), [])
def test_json_lines(folder, damage, rows):
    file = folder / "data.jsonl"
    file.write_bytes(damaged(LINES, damage) + b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    with contextlib.suppress(DataError):
        assert len(read_examples(file)) > 0
