"""A run is resumed only with the settings and the data that it began with."""

import dataclasses

import pytest

from lora_one.config import Config
from lora_one.errors import ConfigError
from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.runs import Run

RECIPE = Recipe(backend="mlx", learning_rate=0.01, config=Config(rank=4, targets=("a", "b")))
DATA = [TokenSequence([1, 2, 3], 1), TokenSequence([4, 5], 0)]


def run_of(losses):
    run = Run.begin(RECIPE, DATA)
    run.before, run.losses = {"exact_match": 0.1}, list(losses)
    return run


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"learning_rate": 0.02}, "learning_rate was 0.01, is 0.02: give them as they were"),
        ({"config": Config(rank=8, targets=("a", "b"))}, "rank was 4, is 8"),
        ({"config": Config(rank=4)}, r"targets was \['a', 'b'\], is 'all-linear'"),
        ({"seed": 1, "steps": 3}, "steps was 200, is 3; seed was 0, is 1"),
        ({"model": "m", "data": "d"}, "model was None, is 'm'; data was None, is 'd'"),
    ],
)
def test_a_setting_that_gives_other_numbers_is_an_error(changes, match):
    with pytest.raises(ConfigError, match=match):
        run_of([]).check_settings(dataclasses.replace(RECIPE, **changes))


def test_settings_that_leave_the_numbers_alone(tmp_path):
    free = {"out": "elsewhere", "save_every": 7, "resume": True, "evaluate": False, "limit": 3, "metrics": ["matthews"]}
    run_of([]).check_settings(dataclasses.replace(RECIPE, **free))


@pytest.mark.parametrize("other", [DATA[:1], DATA[::-1], [DATA[0], TokenSequence([4, 5], 1)], []])
def test_other_data_is_an_error(other):
    run_of([]).check_data(list(DATA))
    with pytest.raises(ConfigError, match="resume needs the training data that the run began with"):
        run_of([]).check_data(other)


def test_other_versions_are_told():
    run = run_of([])
    assert run.changed_versions() == []
    run.versions = {**run.versions, "lora-one": "0.0.0"}
    assert len(run.changed_versions()) == 1
    assert run.changed_versions()[0].startswith("lora-one was 0.0.0, is ")
