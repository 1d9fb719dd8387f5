"""Checkpoints on disk, without a framework: whole or not there, and only of the run that goes on."""

import dataclasses
import errno
import os

import pytest

from lora_one.config import Config
from lora_one.errors import CheckpointError, ConfigError
from lora_one.finetune.checkpoints import Checkpoints, latest
from lora_one.finetune.encoding import TokenSequence
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.runs import Run
from tests.files.kills import killed_before_each_change

RECIPE = Recipe(backend="mlx", learning_rate=0.01, config=Config(rank=4, targets=("a", "b")))
DATA = [TokenSequence([1, 2, 3], 1), TokenSequence([4, 5], 0)]


def run_of(losses):
    run = Run.begin(RECIPE, DATA)
    run.before, run.losses = {"exact_match": 0.1}, list(losses)
    return run


def fill(folder):
    (folder / "state").write_bytes(b"0123")


def written(out, *steps, every=1):
    """Checkpoints of a run after some steps, each loss a number that is not exact in decimals."""
    run = run_of([])
    checkpoints = Checkpoints(run, out, every, last=100)
    for step in range(1, max(steps) + 1):
        run.losses.append(step / 3)
        if step in steps:
            checkpoints.write(step, fill)
    return checkpoints


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def no_warning(text):
    raise AssertionError(text)


def test_what_is_read_is_what_was_written_and_the_last_two_stay(tmp_path):
    checkpoints = written(tmp_path, 2, 4, 6)
    assert names(tmp_path) == ["step-4", "step-6"]
    found = latest(tmp_path, no_warning)
    assert (found.step, found.path.name) == (6, "step-6")
    assert found.run == run_of(n / 3 for n in range(1, 7))
    checkpoints.finish()
    assert names(tmp_path) == ["step-6"]


def test_when_one_is_due(tmp_path):
    assert [step for step in range(1, 8) if Checkpoints(run_of([]), tmp_path, 3, 7).due(step)] == [3, 6, 7]
    assert not any(Checkpoints(run_of([]), tmp_path, None, 7).due(step) for step in range(1, 8))


def test_a_run_that_began_anew_leaves_nothing_of_the_one_before(tmp_path):
    written(tmp_path, 8, 9)
    written(tmp_path, 1)
    assert names(tmp_path) == ["step-1"]


def test_a_run_that_goes_on_keeps_what_it_goes_on_from(tmp_path):
    written(tmp_path, 2, 3)
    start = latest(tmp_path, no_warning)
    checkpoints = Checkpoints(start.run, tmp_path, 1, 9, start)
    start.run.losses.append(0.5)
    checkpoints.write(4, fill)
    assert names(tmp_path) == ["step-3", "step-4"]
    assert (checkpoints.done, latest(tmp_path, no_warning).step) == (3, 4)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no state", "no JSON", "renamed", "empty"])
def test_what_is_damaged_is_passed_over_with_a_warning(damage, tmp_path):
    written(tmp_path, 2, 3)
    newest = tmp_path / "checkpoints" / "step-3"
    if damage == "truncated":
        (newest / "state").write_bytes(b"012")
    elif damage == "flipped":
        (newest / "state").write_bytes(b"0133")
    elif damage == "missing":
        (newest / "state").unlink()
    elif damage == "no state":
        (newest / "run.json").unlink()
    elif damage == "no JSON":
        (newest / "run.json").write_text("{")
    elif damage == "renamed":
        newest.rename(newest.with_name("step-30"))
    else:
        (tmp_path / "checkpoints" / "step-40").mkdir()
        newest.rename(newest.with_name("of-mine"))
    told = []
    assert latest(tmp_path, told.append).step == 2
    assert len(told) == 1
    assert "is damaged, and passed over" in told[0]


def test_nothing_is_there_yet(tmp_path):
    assert latest(tmp_path / "none", no_warning) is None
    (tmp_path / "checkpoints").mkdir()
    assert latest(tmp_path, no_warning) is None


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    checkpoints = written(tmp_path, 2)

    def full(folder):
        fill(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match=r"checkpoints/step-3 cannot be written: No space left on device"):
        checkpoints.write(3, full)

    def fails(folder):
        raise RuntimeError("[write] failed")  # as MLX says it

    with pytest.raises(CheckpointError, match=r"step-3 cannot be written: \[write\] failed"):
        checkpoints.write(3, fails)
    assert names(tmp_path) == ["step-2"]
    assert latest(tmp_path, no_warning).step == 2


def test_killed_before_each_change_to_the_disk_the_newest_whole_one_is_found(tmp_path):
    """Also over what an earlier run left: its steps never are this run's, once this one has written any."""
    written(tmp_path, 7)
    steps = []
    for moment in killed_before_each_change(lambda: written(tmp_path, 1, 2, 3), lambda: written(tmp_path, 7)):
        found = latest(tmp_path, lambda text: None)
        steps.append(0 if found is None else found.step)
        if moment == 0:
            assert names(tmp_path) == ["step-2", "step-3"]
    first = next(at for at, step in enumerate(steps) if step != 7)
    assert steps[first:] == sorted(steps[first:])
    assert set(steps) == {7, 0, 1, 2, 3}
    assert len(steps) > 20


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
