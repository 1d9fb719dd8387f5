"""Checkpoints on disk, without a framework: complete or absent, whenever the process is killed."""

import errno
import os

import pytest

from lora_one.errors import CheckpointError
from lora_one.finetune.checkpoints import Checkpoints, latest
from tests.files.kills import killed_before_each_change
from tests.finetune.test_runs import run_of


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
    checkpoint = latest(tmp_path, no_warning)
    assert (checkpoint.step, checkpoint.path.name) == (6, "step-6")
    assert checkpoint.run == run_of(n / 3 for n in range(1, 7))
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
        checkpoint = latest(tmp_path, lambda text: None)
        steps.append(0 if checkpoint is None else checkpoint.step)
        if moment == 0:
            assert names(tmp_path) == ["step-2", "step-3"]
    first = next(at for at, step in enumerate(steps) if step != 7)
    assert steps[first:] == sorted(steps[first:])
    assert set(steps) == {7, 0, 1, 2, 3}
    assert len(steps) > 20
