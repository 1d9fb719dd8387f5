import pytest

from lora_one.config import Config
from lora_one.errors import ConfigError
from lora_one.recipe import Recipe, make_recipe, read_recipe


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.toml", 'rank = 4\nlearning_rate = 1e-3\ngamma = "auto"\n'),
        ("r.yaml", "rank: 4\nlearning_rate: 0.001\ngamma: auto\n"),
    ],
)
def test_toml_and_yaml_give_the_same_recipe(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    recipe = make_recipe(read_recipe(tmp_path / name))
    assert recipe == Recipe(learning_rate=1e-3, config=Config(rank=4, gamma="auto"))


def test_seed_reaches_the_sketch_too():
    assert make_recipe({"seed": 5}) == Recipe(seed=5, config=Config(seed=5))


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("r.toml", "ranks = 4", "unknown settings ranks; known are .*alpha, backend"),
        ("r.yaml", "- 1", "must hold settings by name, got list"),
        ("r.yaml", "a: [", "is not YAML"),
        ("r.toml", "a = ", "cannot be read"),
        ("r.ini", "", "must end in .toml, .yaml or .yml, got r.ini"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_recipe(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"dtype": "int4"}, "dtype must be float32, bfloat16 or float16, got 'int4'"),
        ({"model": "dir"}, "model is given without data"),
        ({"data": "x.jsonl"}, "data is given without model"),
        ({"rank": 0}, "rank must be an integer"),
        ({"learning_rate": "fast"}, "wrong type|must be"),
    ],
)
def test_settings_that_cannot_be(values, match):
    with pytest.raises(ConfigError, match=match):
        make_recipe(values)
