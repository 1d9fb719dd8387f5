import pytest

from lora_one.config import Config
from lora_one.errors import ConfigError
from lora_one.finetune.recipe import Recipe, make_recipe, read_recipe
from lora_one.finetune.source import Source


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


@pytest.mark.parametrize("name", ["r.toml", "r.yaml"])
def test_a_byte_order_mark_is_no_part_of_a_setting(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + {"r.toml": b"rank = 4\r\n", "r.yaml": b"rank: 4\r\n"}[name])
    assert read_recipe(tmp_path / name) == {"rank": 4}


def test_what_yaml_takes_for_text_is_the_number_that_it_stands_for(tmp_path):
    """YAML 1.1 knows no number without a dot: 2e-4 is text to PyYAML."""
    (tmp_path / "r.yaml").write_text(
        "learning_rate: 2e-4\nweight_decay: '0.01'\nreg: 1e-8\nsteps: 1e3\nmax_length: '512'\nnum_fewshot: '5'\n"
        "gamma: 1e2\npasses: '6'\nalpha: '32'\nrank: 4.0\ndropout: 5e-2\nwarmup_ratio: 3e-2\nseed: '7'\n"
    )
    recipe = make_recipe(read_recipe(tmp_path / "r.yaml"))
    assert recipe == Recipe(
        learning_rate=2e-4,
        weight_decay=0.01,
        reg=1e-8,
        steps=1000,
        max_length=512,
        num_fewshot=5,
        warmup_ratio=0.03,
        seed=7,
        config=Config(gamma=100.0, passes=6, alpha=32.0, rank=4, dropout=0.05, seed=7),
    )
    assert isinstance(recipe.steps, int) and isinstance(recipe.config.passes, int)


NUMBERS = {
    **dict.fromkeys(["steps", "batch_size", "accumulation", "init_batches", "max_length", "limit"], "an integer >= 1"),
    **dict.fromkeys(["warmup", "num_fewshot"], "an integer >= 0"),
    **dict.fromkeys(["learning_rate", "epochs", "alpha", "eta"], "a number > 0"),
    **dict.fromkeys(["weight_decay", "reg"], "a number >= 0"),
    **dict.fromkeys(["warmup_ratio", "dropout"], r"a number in \[0, 1\)"),
    "seed": "an integer",
    "rank": "an integer >= 1",
    "oversample": "an integer >= 0",
    "passes": 'an integer >= 1 or "auto"',
    "gamma": 'a number > 0 or "auto"',
}
OPTIONAL = {"max_length", "limit", "num_fewshot", "epochs", "warmup_ratio"}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", ["abc", "", "nan", float("inf"), float("nan"), -1, True, [1], {"a": 1}, None, 10**400]
)
def test_every_number_is_checked_by_name(name, value):
    if (value is None and name in OPTIONAL) or (value in (-1, 10**400) and NUMBERS[name] == "an integer"):
        return
    if value == 10**400 and "integer" in NUMBERS[name]:
        return
    with pytest.raises(ConfigError, match=f"^{name} must be {NUMBERS[name]}, got "):
        make_recipe({name: value})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"steps": "2.5"}, "steps must be an integer >= 1, got '2.5'"),
        ({"seed": 2**32}, "seed must be an integer >= 0 and <= 4294967295, got 4294967296"),
        ({"rank": 8.5}, "rank must be an integer >= 1, got 8.5"),
        ({"precondition": "false"}, "precondition must be true or false, got 'false'"),
        ({"plain": 1}, "plain must be true or false, got 1"),
        ({"use_rslora": "no"}, "use_rslora must be true or false, got 'no'"),
        ({"device": 0}, "device must be text, got 0: put it in quotes"),
        ({"out": ""}, "out must be text, got ''"),
        ({"backend": None}, "backend must be text, got None"),
        ({"model": 7, "data": "d"}, "model must be text, got 7: put it in quotes"),
        ({"model": "m", "data": ["a"]}, r"data must be text, got \['a'\]"),
        ({"damping": "none"}, "damping must be one of 'absolute', 'relative', got 'none'"),
        ({"schedule": ["linear"]}, r"schedule must be one of 'linear', 'cosine', 'constant', got \['linear'\]"),
        ({"recompute": 1}, "recompute must be one of 'auto', True, False, got 1"),
        ({"targets": 5}, 'targets must be "all-linear", a regular expression or module names, got 5'),
        ({"targets": None}, "targets must be .*, got None"),
        ({"targets": "a{99999999999}"}, "targets must be a regular expression"),
        ({"modules_to_save": 5}, "modules_to_save must be a list, got 5"),
        ({"metrics": [["f1"]]}, r"metrics must be a list of names, got \['f1'\] in it"),
        ({"visual": [None]}, "visual must be a list of names, got None in it"),
        ({"tasks": [{"num_fewshot": 5}]}, 'tasks must be names, or settings with the name as "task"'),
        ({"tasks": [5]}, "tasks must be names, .*, got 5"),
        ({"model": "m", "data": {"path": 5, "prompt": "a", "completion": "b"}}, "data: path must be text, got 5"),
        (
            {"model": "m", "data": {"path": "p", "prompt": "a", "completion": "b", "max_tokens": "few"}},
            "data: max_tokens must be an integer >= 1, got 'few'",
        ),
    ],
)
def test_every_other_setting_is_checked_by_name(values, match):
    with pytest.raises(ConfigError, match=match):
        make_recipe(values)


def test_a_value_without_end_takes_a_line():
    value = [1]
    for _ in range(60):
        value = [value, value]
    with pytest.raises(ConfigError) as caught:
        make_recipe({"rank": value})
    assert len(str(caught.value)) < 500


def test_seed_reaches_the_sketch_too():
    assert make_recipe({"seed": 5}) == Recipe(seed=5, config=Config(seed=5))


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("r.toml", "ranks = 4", "unknown settings ranks; known are .*alpha, backend"),
        ("r.yaml", "- 1", "must hold settings by name, got list"),
        ("r.yaml", "a: [", "is not YAML"),
        ("r.toml", "a = ", "is not TOML that can be read"),
        ("r.yaml", "a: 2001-99-99", "is not YAML that can be read: month must be in"),
        ("r.yaml", "a: " + 5000 * "[", "is not YAML"),
        ("r.toml", "a = " + 5000 * "[", "is not TOML"),
        ("r.yaml", "1: 2\nrank: 3\nx: 4", "unknown settings 1, x; known"),
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
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0, got 0.0"),
        ({"dtype": "int4"}, "dtype must be one of 'float32', 'bfloat16', 'float16', got 'int4'"),
        ({"model": "dir"}, "model is given without data"),
        ({"data": "x.jsonl"}, "data is given without model"),
        ({"rank": 0}, "rank must be an integer"),
        ({"learning_rate": "fast"}, "learning_rate must be a number > 0, got 'fast'"),
        ({"accumulation": 0}, "accumulation must be an integer >= 1, got 0"),
        ({"max_length": 0}, "max_length must be an integer >= 1"),
        ({"epochs": 0}, "epochs must be a number > 0, got 0"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must be a number in \[0, 1\), got 1.0"),
        ({"schedule": "step"}, "schedule must be one of 'linear', 'cosine', 'constant', got 'step'"),
        ({"loss_on": "all"}, "loss_on must be one of 'answers', 'last_answer', 'everything', got 'all'"),
        ({"packing": True}, "packing needs max_length, the tokens of a row: give it"),
        ({"keep_best": True}, "keep_best needs eval_every"),
        ({"early_stopping": 2}, "early_stopping needs eval_every"),
        ({"valid": "v", "valid_share": 0.1}, "valid and valid_share both say what is held out"),
        ({"valid_share": 1.0}, r"valid_share must be a number in \[0, 1\), got 1.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a number >= 0, got -1.0"),
        ({"metrics": ["f1"]}, "metrics must be exact_match or matthews, got f1"),
        ({"tasks": "gsm8k"}, "tasks must be a list, got 'gsm8k'"),
        (
            {"backend": "jax", "report_to": ["wandb"]},
            r"report_to needs the backend torch .* \(metrics.jsonl in",
        ),
        ({"backend": "mlx", "tasks": ["gsm8k"]}, "tasks needs the backend torch so far, got 'mlx': leave it out"),
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
