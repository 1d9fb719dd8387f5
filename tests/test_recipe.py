import pytest

from lora_one.config import Config
from lora_one.errors import ConfigError
from lora_one.recipe import Recipe, make_recipe, read_recipe
from lora_one.sources import Source


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
        ({"accumulation": 0}, "accumulation must be an integer >= 1, got 0"),
        ({"max_length": 0}, "max_length must be an integer >= 1"),
        ({"epochs": 0}, "epochs must be > 0, got 0"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must be in \[0, 1\), got 1.0"),
        ({"schedule": "constant"}, "schedule must be linear or cosine, got 'constant'"),
        ({"metrics": ["f1"]}, "metrics must be exact_match or matthews, got f1"),
        ({"tasks": "gsm8k"}, "tasks must be a list, got 'gsm8k'"),
        ({"backend": "jax", "schedule": "cosine"}, "schedule needs the backend torch so far, got 'jax'"),
        ({"model": "m", "data": {"path": "x"}}, "give either prompt and completion, or conversation"),
    ],
)
def test_settings_that_cannot_be(values, match):
    with pytest.raises(ConfigError, match=match):
        make_recipe(values)


@pytest.mark.parametrize(
    ("settings", "steps", "warmup"),
    [
        ({}, 200, 10),
        ({"epochs": 1, "batch_size": 4}, 3, 10),
        ({"epochs": 2, "batch_size": 4, "accumulation": 2}, 4, 10),  # 3 micro-batches: 2 steps an epoch, as Trainer's
        ({"epochs": 0.5, "batch_size": 1}, 5, 10),
        ({"steps": 100, "warmup_ratio": 0.03}, 100, 3),
        ({"epochs": 1, "batch_size": 3, "warmup_ratio": 0.3}, 4, 2),
    ],
)
def test_epochs_and_shares_become_steps(settings, steps, warmup):
    recipe = make_recipe(settings).for_examples(10)
    assert (recipe.steps, recipe.warmup) == (steps, warmup)
    assert recipe.for_examples(99) == recipe


def test_a_mapping_is_a_source_and_notes_are_passed_over(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\ndata: {path: d, prompt: '{q}', completion: '{a}'}\nnotes: {x: [1]}\n")
    recipe = make_recipe(read_recipe(tmp_path / "r.yaml"))
    assert recipe.data == Source(path="d", prompt="{q}", completion="{a}")
    assert recipe.data.prompt == ("{q}",)
